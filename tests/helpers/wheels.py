"""The project's wheel, and environments where it is installed beside the running interpreter's packages."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path) -> Path:
    """Builds the wheel into `folder` from a copy of the sources, so that nothing is left beside them."""
    pytest.importorskip("setuptools", minversion="77")
    copy = folder / "project"
    for name in ("compiler", "runtime", "templates"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, without: Iterable[str] = ()) -> Path:
    """Installs a wheel into a new virtual environment, offline, and returns the environment's folder of commands.

    Only the distributions that the wheel requires without extras are linked there from the running interpreter's
    packages, except those in `without`.
    """
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", wheel], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (own,) = metadata.distributions(path=[str(packages)])
    for distribution in _required_by(own, without):
        _link(distribution, packages)
    return environment / "bin"


def clean_environment() -> dict[str, str]:
    """The environment of this process without the variables that show Python other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}


def _required_by(distribution: metadata.Distribution, without: Iterable[str]) -> Iterable[metadata.Distribution]:
    """The installed distributions that a distribution needs, without itself."""
    seen = set(without)
    found: list[metadata.Distribution] = []
    waiting = [(distribution, "")]
    while waiting:
        current, extra = waiting.pop()
        for requirement in map(Requirement, current.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = metadata.distribution(requirement.name)
            waiting += [(needed, other) for other in requirement.extras]
            if needed.name.lower() not in seen:
                seen.add(needed.name.lower())
                found.append(needed)
                waiting.append((needed, ""))
    return found


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    if distribution.files is None:
        pytest.skip(f"{distribution.name} was installed without a list of its files")
    for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (packages / name).exists():  # distributions may share a folder
            (packages / name).symlink_to(str(distribution.locate_file(name)))
