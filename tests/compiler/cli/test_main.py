"""The command line: its output on each stream, and its exit status."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import packages
import surgeon.runtime
import topologies
from command_line import RUN, fails
from surgeon.compiler.cli import main as cli
from surgeon.compiler.cli.main import COMMANDS


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


def test_both_scripts_are_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    scripts = {name: EntryPoint(name, value, "console_scripts") for name, value in project["scripts"].items()}
    assert scripts.keys() == {"surgeon", "surgeon-compile"}
    assert scripts["surgeon"].load() is cli.main
    assert scripts["surgeon-compile"].load() is cli.main_compile


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required: COMMAND", "see surgeon --help"]),
        (["assemble"], ["invalid choice: 'assemble'", "compile"]),
        (["asess", "m"], ["invalid choice: 'asess'", "did you mean assess?", "see surgeon --help"]),
        (["--versoin"], ["--versoin", "did you mean --version?", "see surgeon --help"]),
        (["learn", "m", "--lenght=5"], ["--lenght; did you mean --length?", "see surgeon learn --help"]),
        (["learn", "m", "--denstiy", ".5"], ["--denstiy; did you mean --density?", "see surgeon learn --help"]),
        (["compile", "t.json", "--ouut", "k"], ["--ouut; did you mean --out?", "see surgeon compile --help"]),
        (["compile", "t.json", "--out", "k", "--zebra"], ["arguments: --zebra; see surgeon compile --help"]),
        (["learn", "m", "--method", "budgt"], ["did you mean budget?", "see surgeon learn --help"]),
        (["inspect", "a", "b"], ["arguments: b; see surgeon inspect --help"]),
        (["compile", "t.json"], ["required: --out", "see surgeon compile --help"]),
        (["compile", "--out", "k"], ["required: topology.json"]),
        (["compile", "t.json", "--out", ""], ["--out", "empty name"]),
        (["compile", "t.json", "--out", "k", "--jobs", "0"], ["--jobs", "at least 1", "'0'"]),
        (["compile", "t.json", "--out", "k", "--jobs", "-1"], ["--jobs"]),
        (["compile", "t.json", "--out", "k", "--jobs", "two"], ["--jobs", "whole number", "'two'"]),
        (["compile", "t.json", "--out", "k", "--dtype", "fp8"], ["--dtype", "fp8", "fp32", "bf16", "fp16"]),
        (["compile", "t.json", "--out", "k", "--jo", "2"], ["--jo"]),
        (["inspect"], ["FILE_OR_FOLDER"]),
        (["inspect", "a", "b\x1b[31m\nc"], ["unrecognized arguments", r"b\x1b[31m\nc"]),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, *arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 column 2"),
        ("[]", "expected an object"),
        ('{"\x1b]0;owned\x07": 1}', "line 1 column"),
        ('{"format": "surgeon.topology"}', "expected the key 'version'"),
        ("[" * 100_000, "nesting"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_a_broken_topology_is_one_line(
    command: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    out = ["--out", tmp_path / "kernels"] if command == "compile" else []
    line = fails(capsys, 2, command, file, *out)
    assert "bad.json" in line
    assert words in line
    assert not (tmp_path / "kernels").exists()


def test_the_single_command_suggests_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main_compile(["t.json", "--jbos", "2"]) == 2
    said = capsys.readouterr().err
    assert said == "surgeon: unrecognized arguments: --jbos; did you mean --jobs?; see surgeon-compile --help\n"


def test_what_follows_two_dashes_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--absent: expected a readable file" in fails(capsys, 2, "inspect", "--", "--absent")


def test_control_characters_of_the_input_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(topologies.document([[topologies.DENSE]]) | {"\x1b[31m\u202e\n": 1}))
    assert r"unknown key '\x1b[31m\u202e\n'" in fails(capsys, 2, "inspect", file)
    name = tmp_path / "a\x1b[2J\nb"
    assert r"a\x1b[2J\nb: expected a readable file" in fails(capsys, 2, "inspect", name)


@pytest.mark.parametrize("program", [cli.main, cli.main_compile])
def test_version(program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["--version"]) == 0
    assert capsys.readouterr().out == f"surgeon-compile {surgeon.runtime.__version__}\n"


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command.name in text
        assert command.summary in text
    assert cli.main(["compile", "--help"]) == 0
    inner = capsys.readouterr().out
    assert cli.main_compile(["--help"]) == 0
    outer = capsys.readouterr().out
    for option in ("topology.json", "--out", "--target", "--dtype", "--jobs", "--dump", "--json"):
        assert option in inner
        assert option in outer
    assert inner.startswith("usage: surgeon compile")
    assert outer.startswith("usage: surgeon-compile")


def test_errors_of_a_process_are_one_plain_line(tmp_path: Path) -> None:
    result = run("inspect", "none.json", cwd=tmp_path, FORCE_COLOR="1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        result.stderr == "surgeon: none.json: expected a readable file, got No such file or directory; check the path\n"
    )


@pytest.mark.parametrize(
    "arguments", [["inspect", "topology.json"], ["inspect", "topology.json", "--json"], ["--help"]]
)
def test_a_reader_that_leaves_is_no_error(arguments: list[str], topology_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=topology_file.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=300,
    )
    os.close(writer)
    assert result.returncode == 141
    assert result.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line(topology_file: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", RUN, "inspect", str(topology_file)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=topology_file.parent,
            timeout=300,
        )
    assert result.returncode == 1
    assert result.stderr == "surgeon: standard output: No space left on device\n"


def test_interrupting_a_process_leaves_one_line(topology_file: Path) -> None:
    program = (
        "import signal, sys, time, surgeon.compiler.pipeline as pipeline\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "def compile_package(*_, **__):\n    print('started', flush=True)\n    time.sleep(300)\n"
        "pipeline.compile_package = compile_package\n" + RUN
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "compile", str(topology_file), "--out", "kernels"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=topology_file.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "surgeon: interrupted\n"


HEAVY = {"torch", "triton", "transformers", "networkx", "jinja2", "rich", "multiprocessing", "concurrent"}


def imported_by(*arguments: str | Path, status: int = 0) -> set[str]:
    """The top-level modules that a fresh process has imported when a command ends with `status`."""
    program = (
        "import sys\nfrom surgeon.compiler.cli.main import main\nstatus = main()\nprint(*sys.modules)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--version"], 0), (["compile", "--help"], 0), ([], 2), (["compile", "t", "--out", ""], 2)],
)
def test_help_and_wrong_usage_import_only_the_standard_library(arguments: list[str], status: int) -> None:
    assert not imported_by(*arguments, status=status) & (HEAVY | {"numpy", "safetensors"})


def test_inspecting_imports_only_what_reads_and_verifies(topology_file: Path, tmp_path: Path) -> None:
    assert not imported_by("inspect", topology_file) & HEAVY
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1, 2], num_layers=2, num_blocks=4))
    assert not imported_by("inspect", folder) & HEAVY
    (folder / "cpu" / "attention.so").write_bytes(b"damaged")
    assert not imported_by("inspect", folder, status=2) & HEAVY
    assert not imported_by("inspect", tmp_path / "nothing", status=2) & HEAVY
