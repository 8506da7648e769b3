"""The distribution's name, version and extras, and the errors that name them."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from surgeon.runtime.errors import ModelError, TargetError
from surgeon.runtime.installation import DISTRIBUTION, EXTRAS, required, version

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}


def test_the_extras_are_those_of_the_project() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    extras = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in names(extras[extra])
        assert package not in names(PROJECT["dependencies"])
    for extra in EXTRAS.values():
        assert extra in re.split(r"[\[\],]", extras["all"][0])


def test_the_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {DISTRIBUTION: "1.2.3"}.__getitem__)
    assert version() == "1.2.3"


def test_a_source_tree_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version() == "0+source"


def test_a_missing_package_is_an_error_that_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModelError) as caught:
        required("scipy", ModelError, "--cuts")
    text = "--cuts: expected the Python package scipy, got none; run pip install 'surgeon-compile[learn]'"
    assert str(caught.value) == text


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(TargetError, match=r"got No module named 'no_such_library'; run pip install .*, or go home$"):
        required("triton", TargetError, "target cuda:90", "go home")


def test_a_package_that_is_there_is_no_error() -> None:
    required("scipy", ModelError, "--cuts")
