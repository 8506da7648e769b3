"""The faces of the two halves: public names, which are imported when they are first used."""

import pydoc
import re
import subprocess
import sys
from types import ModuleType

import pytest

import surgeon.compiler
import surgeon.runtime

FACES = [surgeon.compiler, surgeon.runtime]


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_there_and_listed(face: ModuleType) -> None:
    for name in face.__all__:
        assert getattr(face, name) is not None
    assert [name for name in dir(face) if not name.startswith("__")] == sorted(set(face.__all__) - {"__version__"})


@pytest.mark.parametrize("face", FACES)
def test_help_shows_every_public_name(face: ModuleType) -> None:
    shown = pydoc.plain(pydoc.render_doc(face))
    for name in set(face.__all__) - {"__version__", "errors"}:
        assert re.search(rf"^    (class )?{name}\(", shown, re.MULTILINE), name


@pytest.mark.parametrize("face", FACES)
def test_another_name_is_an_attribute_error(face: ModuleType) -> None:
    with pytest.raises(AttributeError, match=rf"module '{face.__name__}' has no attribute 'no_such_name'"):
        _ = face.no_such_name


def test_errors_and_the_version_come_without_torch() -> None:
    script = (
        "import sys, surgeon.compiler, surgeon.runtime\n"
        "assert surgeon.runtime.errors.SurgeonError and surgeon.runtime.__version__ and dir(surgeon.runtime)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
