"""The rooms of the source tree, the order that their imports follow, and what a wheel carries."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from surgeon.runtime.installation import EXTRAS
from wheels import build_wheel

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "runtime", "templates")
ROOMS = (
    "runtime.errors",
    "runtime.installation",
    "runtime.package",
    "runtime.packed_batch",
    "runtime.operands",
    "runtime.cache",
    "runtime.kernels.cpu",
    "runtime.kernels.gpu",
    "runtime.kernels",
    "runtime.ops",
    "runtime.loading",
    "runtime.transformers",
    "runtime.transformers.graph",
    "runtime.vllm.pages",
    "runtime.vllm",
    "runtime.evaluate.tasks",
    "runtime.evaluate",
    "runtime.evaluate.pilot",
    "compiler.system",
    "compiler.topology",
    "compiler.schedule",
    "compiler.specs",
    "compiler.dump",
    "compiler.kernels.cpu",
    "compiler.kernels.gpu",
    "compiler.kernels",
    "compiler.package",
    "compiler.pipeline",
    "compiler.learn.patterns",
    "compiler.learn.texts",
    "compiler.learn.measure",
    "compiler.forecast",
    "compiler.learn.budget",
    "compiler.learn.ultrametric",
    "compiler.learn.routing",
    "compiler.learn",
    "compiler.tune",
    "compiler.pilot",
    "compiler.plan",
    "compiler.cli",
)
"""Every room, a folder or a module beside folders, imports only rooms above it here."""
MAX_LEVELS = 9
MAX_FILES = 12
MAX_LINES = 350
WITHOUT_TORCH = ("runtime.package", "compiler.topology")
LIBRARIES = {"transformers": ("runtime.transformers", "runtime.evaluate"), "vllm": ("runtime.vllm",)}
"""Libraries that the runtime keeps to some of its rooms."""

Graph = Mapping[str, set[str]]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


MODULES = {module_of(file): file for file in sources(*FOLDERS)}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it, also for type checkers and inside functions.

    Those of this tree are named without `surgeon.`; `from package import module` names the module.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                full = [f"{module}.{alias.name}" for alias in aliases]
                names = [name if name.removeprefix("surgeon.") in MODULES else module for name in full]
            case ast.ImportFrom():
                names = [f"relative import in {file.name}"]
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                names = []
        yield from (name.removeprefix("surgeon.") for name in names)


def at_import(file: Path) -> Iterator[str]:
    """The modules that a file's own statements import, and not those inside functions and classes."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module)):
                yield module


def room_of(module: str) -> str:
    """The folder of a module, or the module itself where it lies beside folders, as `compiler.pipeline` does."""
    if MODULES[module].name == "__init__.py":
        return module
    folder = module.rpartition(".")[0]
    return module if folder in FOLDERS else folder


def module_graph() -> Graph:
    """Which modules each module imports; the lazy names of the two faces stand for no imports of theirs."""
    faces = set(FOLDERS)
    return {
        module: {name for name in imported(file) if name in MODULES and name not in {module} | faces}
        for module, file in MODULES.items()
        if module not in faces
    }


def room_graph() -> Graph:
    graph: dict[str, set[str]] = {}
    for module, others in module_graph().items():
        room = room_of(module)
        graph.setdefault(room, set()).update(other for name in others if (other := room_of(name)) != room)
    return graph


def levels(graph: Graph) -> dict[str, int]:
    """How many nodes the longest chain of imports from each node has, itself included.

    Raises:
        ValueError: there is a circle, which it names.
    """
    found: dict[str, int] = {}

    def visit(node: str, path: tuple[str, ...]) -> int:
        if node in path:
            raise ValueError(f"circle of imports: {' -> '.join((*path[path.index(node) :], node))}")
        if node not in found:
            found[node] = 1 + max((visit(other, (*path, node)) for other in graph.get(node, ())), default=0)
        return found[node]

    for node in graph:
        visit(node, ())
    return found


def test_the_scan_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "forms.py"
    file.write_text(
        "import surgeon.compiler.topology.read as r\n"
        "from surgeon.compiler.system import cache\n"
        "from surgeon.compiler.system.cache import Cache\n"
        "if TYPE_CHECKING:\n"
        "    import torch\n"
        "def later():\n"
        "    from surgeon.compiler.package.write import write_package\n"
        "    importlib.import_module('surgeon.compiler.cli.main')\n"
        "    __import__('surgeon.compiler')\n"
        "from . import near\n"
    )
    assert sorted(imported(file)) == [
        "compiler",
        "compiler.cli.main",
        "compiler.package.write",
        "compiler.system.cache",
        "compiler.system.cache",
        "compiler.topology.read",
        "relative import in forms.py",
        "torch",
    ]


def test_levels_are_counted_and_circles_named() -> None:
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}
    with pytest.raises(ValueError, match="circle of imports: b -> c -> b"):
        levels({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_there_is_no_circle_of_modules_nor_of_rooms() -> None:
    levels(module_graph())
    levels(room_graph())


@pytest.mark.parametrize("half", ["compiler", "runtime"])
def test_a_half_has_few_levels_of_rooms(half: str) -> None:
    own = {room: {other for other in others if other.startswith(half)} for room, others in room_graph().items()}
    found = levels({room: others for room, others in own.items() if room.startswith(half)})
    for room in sorted(found, key=lambda room: (found[room], room)):
        print(found[room], room)
    assert max(found.values()) <= MAX_LEVELS


def test_every_room_imports_only_rooms_below_it() -> None:
    rooms = {room for room in room_graph() if room != "templates"}
    assert rooms <= set(ROOMS), "put the new room into ROOMS, where its imports allow it"
    upward = [
        f"{room} imports {other}"
        for room, others in room_graph().items()
        for other in others
        if room in ROOMS and ROOMS.index(other) >= ROOMS.index(room)
    ]
    assert upward == []


@pytest.mark.parametrize("file", sources("runtime", "templates"), ids=module_of)
def test_the_runtime_never_imports_the_compiler(file: Path) -> None:
    assert not [name for name in imported(file) if name.startswith(("compiler", "templates", "relative"))]


def test_every_library_is_one_that_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    ours = {*FOLDERS, "surgeon", *sys.stdlib_module_names}
    names = {name.split(".")[0] for file in sources(*FOLDERS) for name in imported(file)} - ours
    elsewhere = {"cuda", "vllm"}  # of the extra gpu, without which the runtime goes on; and whose plugin we are
    assert names - base - EXTRAS.keys() - elsewhere == set()
    assert base - names == set(), "what nothing imports need not be installed"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_formats_are_read_without_torch(room: str) -> None:
    files = sources(room.replace(".", "/"))
    assert not [f"{file}: {name}" for file in files for name in imported(file) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_to_its_rooms_alone(library: str) -> None:
    users = {module_of(file) for file in sources("runtime") for name in imported(file) if name.split(".")[0] == library}
    assert [user for user in sorted(users) if not user.startswith(LIBRARIES[library])] == []


def test_folders_and_files_are_small() -> None:
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name != "__pycache__"]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}
    code = {path.relative_to(ROOT).as_posix(): path for path in files if path.suffix in (".py", ".jinja")}
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in code.items()}
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


@pytest.mark.slow
def test_the_runtime_imports_without_what_only_the_compiler_needs() -> None:
    plugged = {module for module, file in MODULES.items() if "vllm" in {name.split(".")[0] for name in at_import(file)}}
    modules = [f"surgeon.{module}" for module in MODULES if module.startswith("runtime.") and module not in plugged]
    script = (
        "import importlib, sys\n"
        "for name in ('jinja2', 'networkx', 'rich', 'triton', 'vllm', 'surgeon.compiler', 'surgeon.templates'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_and_scheduling_import_no_torch() -> None:
    script = "import sys, surgeon.compiler.specs.specialize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests").returncode == 0


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        setuptools = tomllib.load(stream)["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT).as_posix() for file in sources(*FOLDERS)}
    assert setuptools["package-dir"] == {f"surgeon.{name}": name for name in FOLDERS}
    assert sorted(setuptools["packages"]) == sorted("surgeon." + folder.replace("/", ".") for folder in folders)


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_packages(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name.startswith("surgeon_compile-")
    expected = {
        f"surgeon/{file.relative_to(ROOT).as_posix()}"
        for name in FOLDERS
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__" and file.name != "README.md"  # a page of the tree
    }
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert carried == expected
    kinds = {Path(name).suffix for name in carried} | {Path(name).name for name in carried}
    assert kinds >= {".py", ".jinja", ".json", "py.typed"}
