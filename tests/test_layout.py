"""The rules that hold between the packages, and what a wheel carries."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "runtime", "templates")
LEAVES = {"surgeon.runtime.errors", "surgeon.runtime.manifest", "surgeon.runtime.target"}
# What else a module of the compiler may take from the runtime: `surgeon inspect` shows packages through their readers.
MORE = {
    "beside_dense.py": {"surgeon.runtime.estimates", "surgeon.runtime.pilot_results"},
    "hf_kernels.py": {"surgeon.runtime.package"},
    "inspection.py": {"surgeon.runtime.dense_rows", "surgeon.runtime.package", "surgeon.runtime.schedules"},
    "learn/assess.py": {"surgeon.runtime.fingerprints"},
    "learn/assess_command.py": {"surgeon.runtime.processes"},
    "learn/command.py": {"surgeon.runtime.processes"},
    "learn/decoder.py": {"surgeon.runtime.placement"},
    "learn/descent.py": {"surgeon.runtime.processes"},
    "learn/learn.py": {"surgeon.runtime.fingerprints", "surgeon.runtime.processes"},
    "learn/models.py": {"surgeon.runtime.processes"},
    "learn/runs.py": {"surgeon.runtime.placement", "surgeon.runtime.processes"},
    "listing.py": {"surgeon.runtime.dense_rows"},
    "packaged.py": {"surgeon.runtime.package", "surgeon.runtime.schedules"},
    "pilot.py": {
        "surgeon.runtime.fingerprints",
        "surgeon.runtime.loading",
        "surgeon.runtime.package",
        "surgeon.runtime.passkeys",
        "surgeon.runtime.patching",
        "surgeon.runtime.pilot",
        "surgeon.runtime.pilot_results",
        "surgeon.runtime.processes",
    },
    "pilot_table.py": {"surgeon.runtime.estimates", "surgeon.runtime.pilot_results"},
    "report.py": {"surgeon.runtime.pilot_results"},
    "report_pilots.py": {"surgeon.runtime.estimates", "surgeon.runtime.pilot_results"},
    "tune/trial.py": {"surgeon.runtime.gpu", "surgeon.runtime.loading"},
}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, by name; at most three parts of the name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases, level=0):
                names = [f"{module}.{alias.name}" for alias in aliases]
            case ast.ImportFrom():
                names = [f"relative import in {file.name}"]
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                names = []
        yield from (".".join(name.split(".")[:3]) for name in names)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_scan_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "forms.py"
    file.write_text(
        "import surgeon.compiler.read as r\n"
        "from surgeon.compiler import cache\n"
        "def later():\n"
        "    from surgeon.compiler.package import write\n"
        "    importlib.import_module('surgeon.compiler.cli')\n"
        "    __import__('surgeon.compiler')\n"
        "from . import near\n"
    )
    assert sorted(imported(file)) == [
        "relative import in forms.py",
        "surgeon.compiler",
        "surgeon.compiler.cache",
        "surgeon.compiler.cli",
        "surgeon.compiler.package",
        "surgeon.compiler.read",
    ]


@pytest.mark.parametrize("file", [*sources("runtime"), *sources("templates")], ids=lambda file: file.name)
def test_the_runtime_never_imports_the_compiler(file: Path) -> None:
    assert not [name for name in imported(file) if name.startswith(("surgeon.compiler", "surgeon.templates", "rel"))]


@pytest.mark.parametrize("file", sources("compiler"), ids=lambda file: file.name)
def test_the_compiler_takes_only_leaves_of_the_runtime(file: Path) -> None:
    taken = {name for name in imported(file) if name.startswith(("surgeon.runtime", "rel"))}
    assert taken - LEAVES == MORE.get(file.relative_to(ROOT / "compiler").as_posix(), set())


@pytest.mark.slow
def test_the_runtime_imports_without_what_only_the_compiler_needs() -> None:
    modules = [f"surgeon.runtime.{file.stem}" for file in sources("runtime") if file.stem != "__init__"]
    script = (
        "import importlib, sys\n"
        "for name in ('jinja2', 'networkx', 'rich', 'triton', 'surgeon.compiler', 'surgeon.templates'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_and_scheduling_import_no_torch() -> None:
    script = "import sys, surgeon.compiler.specialize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests").returncode == 0


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        setuptools = tomllib.load(stream)["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT).as_posix() for name in FOLDERS for file in sources(name)}
    packages = {"surgeon." + folder.replace("/", "."): folder for folder in folders}
    assert setuptools["package-dir"] == packages
    assert sorted(setuptools["packages"]) == sorted(packages)


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "project"
    for name in FOLDERS:  # a copy, so that the build leaves nothing behind
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    expected = {
        "surgeon/" + file.relative_to(copy).as_posix()
        for name in FOLDERS
        for file in (copy / name).rglob("*")
        if file.is_file() and "egg-info" not in str(file)
    }
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert carried == expected
    kinds = {Path(name).suffix for name in carried} | {Path(name).name for name in carried}
    assert kinds >= {".py", ".jinja", ".json", "py.typed"}
