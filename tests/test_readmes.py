"""The README pages: their Python runs, their commands parse, and what they link to or name is there."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from models import sparse_topology, tiny_llama, tokens
from processes import torchrun
from surgeon.compiler import compile_package
from surgeon.compiler.cli import main as cli
from surgeon.compiler.package.export_hf import export
from surgeon.runtime import load, patch
from surgeon.runtime.vllm.options import options_of

ROOT = Path(__file__).parents[1]
FRONT = ROOT / "README.md"
PAGES = (FRONT, *(ROOT / name / "README.md" for name in ("compiler", "runtime", "benchmarks", "tests")))
FIRST_SCREEN, COLUMNS, MOST_FIGURES = 60, 100, 8
OPTIONAL = ("kernels", "peft")
"""Libraries that a page's Python may import and an installation may lack."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


PYTHON = [
    pytest.param(code, id=f"{name_of(page)} {number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"), start=1)
]
COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{name_of(page)}: {line[:40]}")
    for page in PAGES
    for line in "".join(blocks(page, "sh")).splitlines()
]


def prose(page: Path) -> str:
    """The page without its fenced blocks and comments."""
    return re.sub(r"^```.*?^```|<!--.*?-->", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def quoted(page: Path) -> set[str]:
    """What stands between backticks in the page's prose."""
    return set(re.findall(r"`([^`]+)`", prose(page)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' Python takes for granted: a model, its topology and package, an export, a pilot."""
    folder = tmp_path_factory.mktemp("readmes")
    topology = sparse_topology()
    (folder / "topology.json").write_text(topology.canonical(), encoding="utf-8")
    tiny_llama().save_pretrained(folder / "path/to/llama")
    compile_package(topology, folder / "kernels", dtypes=("fp32",))
    export(folder / "kernels", folder / "folder")
    figures = {"first_token_speedup": {"value": 1.08, "error": 0.02}}  # within two errors of what is asked for
    pilot = {"columns": [{"name": "patched", "against_dense": figures}]}
    (folder / "pilot.json").write_text(json.dumps(pilot), encoding="utf-8")
    return folder


@pytest.fixture
def given(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> dict[str, Any]:
    """The names that the pages' Python takes for granted, in a folder of its own."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    package, ids = load("kernels", strict=True), tokens(1, 70)
    patched = tiny_llama()
    patch(patched, package, recall="pattern")
    arguments = TrainingArguments("adapters", max_steps=1, use_cpu=True, save_strategy="no", report_to=[])
    return {
        "package": package,
        "model": tiny_llama(),
        "dense": tiny_llama(),
        "patched": patched,
        "prompt": ids,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "sequences": [ids],
        "texts": [{"input_ids": ids[0], "labels": ids[0]}] * 2,
        "arguments": arguments,
    }


def test_the_first_screen_has_what_a_reader_needs_first() -> None:
    screen = text_of(FRONT).splitlines()[:FIRST_SCREEN]
    assert [line for line in screen if len(line) > COLUMNS] == []
    shown = "\n".join(screen)
    assert shown.startswith("# Surgeon\n")
    assert "make demo" in shown
    assert "make test" in shown
    code = blocks(FRONT, "python")[0]
    assert code in shown + "\n"
    assert len([line for line in code.splitlines() if line]) == 6
    figures = re.findall(r"<!-- figures: .*?<!-- end of figures -->", shown, re.DOTALL)
    rows = [line for line in "".join(figures).splitlines() if line.startswith("| ")]
    assert 1 < len(rows) <= 1 + MOST_FIGURES
    limits = shown.partition("What it does not do:\n")[2].partition("\n## ")
    assert limits[0].count("\n- ") >= 3
    assert limits[1], "the list goes on below the first screen"


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, given: dict[str, Any]) -> None:
    for name in OPTIONAL:
        if re.search(rf"^import .*\b{name}\b", code, re.MULTILINE):
            pytest.importorskip(name)
    if "DistributedConfig" in code:
        script = Path("script.py").absolute()
        script.write_text(f"import os\nos.chdir({str(script.parent)!r})\n{code}", encoding="utf-8")
        torchrun(script)
    else:
        exec(compile(code, "README", "exec"), given)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_there_is(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0] == "torchrun":
        command = command[command.index("--no-python") + 1 :]
    match command:
        case ["surgeon", *arguments]:
            idle = [dataclasses.replace(known, run=lambda _: ()) for known in cli.COMMANDS]
            monkeypatch.setattr(cli, "COMMANDS", idle)
            assert cli.main(arguments) == cli.DONE
        case ["make", target]:
            assert re.search(rf"^{target}:", text_of(ROOT / "Makefile"), re.MULTILINE)
        case ["pip", "install", *what]:
            with (ROOT / "pyproject.toml").open("rb") as stream:
                project = tomllib.load(stream)["project"]
            extras = {extra for name in what for extra in re.findall(r"\.\[(.*)\]", name)}
            assert extras <= project["optional-dependencies"].keys()
            libraries = {re.split(r"\W", requirement)[0] for requirement in project["dependencies"]}
            assert {name for name in what if name.isalnum()} <= libraries
        case ["vllm", "serve", _, "--dtype", _, "--additional-config", options]:
            assert options_of(json.loads(options), {}) is not None
        case [script, "python", program, *_]:
            assert (ROOT / script).is_file()
            assert (ROOT / program).is_file() or (ROOT / program / "__main__.py").is_file()
        case _:
            pytest.fail(f"no test knows of this command: {shlex.join(command)}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", prose(page))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_surgeon_are_there(page: Path) -> None:
    for name in re.findall(r"\bsurgeon\.(?:compiler|runtime)[\w.]*\w", " ".join(quoted(page))):
        assert resolved(name) is not None, name


def resolved(name: str) -> object:
    """The object of a dotted name, a module or what is in one."""
    parts = name.split(".")
    found: Any = importlib.import_module(".".join(parts[:2]))
    for end, part in enumerate(parts[2:], start=3):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:end]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    made = {"build/pilot.html", "kernels/", "folder/"}
    named = {name for name in quoted(page) if re.fullmatch(r"[\w./-]+/[\w./-]*|[\w-]+\.py", name)} - made
    own = {name for name in named if not name.startswith(("/", "."))}
    assert [name for name in own if not any((folder / name).exists() for folder in (ROOT, page.parent))] == []


@pytest.mark.parametrize("half", ["compiler", "runtime"])
def test_every_room_has_a_line(half: str) -> None:
    page = ROOT / half / "README.md"
    lines = re.findall(r"^\| `(\w+/)` \|", text_of(page), re.MULTILINE)
    rooms = [file.parent for file in (ROOT / half).rglob("__init__.py") if file.parent != page.parent]
    named = {room.relative_to(page.parent).as_posix() + "/" for room in rooms}
    assert sorted(lines) == sorted(name for name in named if name.count("/") == 1)
    assert named <= quoted(page)
