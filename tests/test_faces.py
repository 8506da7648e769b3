"""The faces of the two halves: public names, which are imported when they are first used."""

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
    assert set(face.__all__) <= set(dir(face))


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
