"""The versions in the cache keys of compiled parts."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import surgeon.runtime
from surgeon.compiler.system.versions import TRITON, Range, versions


def test_versions_are_those_installed_and_surgeons_own() -> None:
    assert versions("numpy", "no-such-distribution") == (version("numpy"), "none", surgeon.runtime.__version__)


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.7", True),
        ("3.9.9", True),
        ("3.10.0", False),
        ("4.6.0", False),
        ("x", False),
    ],
)
def test_a_range_holds_all_versions_of_its_minors(version: str, inside: bool) -> None:
    assert (version in Range((3, 6), (3, 9))) == inside


def test_the_project_asks_for_the_tested_versions_of_triton() -> None:
    with (Path(__file__).parents[3] / "pyproject.toml").open("rb") as stream:
        extras = tomllib.load(stream)["project"]["optional-dependencies"]
    assert f"triton{TRITON.requirement}; platform_system == 'Linux'" in extras["gpu"]
