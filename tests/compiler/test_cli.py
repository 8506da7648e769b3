"""The command line: what it prints where, and with which status it ends."""

import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import packages
import surgeon.compiler
import topologies
from surgeon.compiler import cli
from surgeon.compiler.progress import progress_bar
from surgeon.compiler.tiles import read_tiles
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import BuildError, PackageError
from surgeon.runtime.manifest import FileEntry, KernelEntry, Manifest

TILES = Path(surgeon.compiler.__file__).with_name("tiles.json")
RUN = "import sys; from surgeon.compiler.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    file = tmp_path / "topology.json"
    file.write_text(
        json.dumps(
            topologies.document([[topologies.DENSE, topologies.head()]], [{"linkage": [[0, 1, 1.0, 2]]}], num_blocks=2)
        )
    )
    return file


class Compiler:
    """Stands in for compile_package: keeps its arguments, and makes the one file that the command line reads."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, topology: Topology, out: Path, **arguments: Any) -> Path:
        self.calls.append({"topology": topology, "out": out} | arguments)
        if self.error is not None:
            raise self.error
        kernel = KernelEntry("cpu", "fp32", (0,), "attention_000", "cpu/kernels.so", "f", (), None, 0, ())
        manifest = Manifest(
            topology_sha256=topology.sha256,
            model=topology.model,
            block_size=topology.block_size,
            num_blocks=topology.num_blocks,
            beyond=topology.beyond,
            layers=topology.covered,
            kernels=(kernel,),
            files=(FileEntry("cpu/kernels.so", 1000, "0" * 64),),
            tools=(),
        )
        out.mkdir()
        (out / "manifest.json").write_text(manifest.to_json())
        return out


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr("surgeon.compiler.pipeline.compile_package", stand_in)
    return stand_in


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    """The one line on standard error of a run that must end with `status` and print nothing else."""
    assert cli.main(list(map(str, arguments))) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("surgeon: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


def test_compile_prints_one_line_of_what_it_made(
    topology_file: Path, compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    out = topology_file.parent / "kernels"
    assert cli.main(["compile", str(topology_file), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    size = 1000 + (out / "manifest.json").stat().st_size
    assert printed.out.startswith(f"{out}: 1 kernel for cpu, {size:,} bytes, ")
    assert printed.out.count("\n") == 1
    assert printed.err == ""


def test_compile_hands_its_options_on(topology_file: Path, compiler: Compiler) -> None:
    out = topology_file.parent / "kernels"
    targets = ["--target", "cuda:90", "--target", "cpu", "--target", "cuda:90"]
    dtypes = ["--dtype", "fp16", "--dtype", "bf16"]
    others = ["--jobs", "3", "--dump", str(out / "dump"), "--tiles", str(TILES)]
    assert cli.main_compile([str(topology_file), "--out", str(out), *targets, *dtypes, *others]) == 0
    (call,) = compiler.calls
    assert call.pop("topology").num_blocks == 2
    assert call == {
        "out": out,
        "targets": ("cuda:90", "cpu"),
        "dtypes": ("fp16", "bf16"),
        "jobs": 3,
        "dump": out / "dump",
        "progress": None,
        "tiles": read_tiles(TILES),
    }


def test_compile_leaves_defaults_to_the_compiler(topology_file: Path, compiler: Compiler) -> None:
    assert cli.main(["compile", str(topology_file), "--out", str(topology_file.parent / "kernels")]) == 0
    (call,) = compiler.calls
    assert (call["targets"], call["dtypes"], call["jobs"], call["dump"]) == (("cpu",), None, None, None)


def test_compile_json(topology_file: Path, compiler: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    out = topology_file.parent / "kernels"
    assert cli.main(["compile", str(topology_file), "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["path", "id", "topology_sha256", "targets", "kernels", "bytes", "seconds"]
    assert made["path"] == str(out)
    assert made["targets"] == ["cpu"]
    assert made["kernels"] == 1
    assert made["topology_sha256"] == compiler.calls[0]["topology"].sha256


def test_both_scripts_are_declared() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert scripts["surgeon"].load() is cli.main
    assert scripts["surgeon-compile"].load() is cli.main_compile


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required: COMMAND", "see surgeon --help"]),
        (["assemble"], ["invalid choice: 'assemble'", "compile"]),
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


def test_compile_refuses_a_missing_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, "compile", tmp_path / "none.json", "--out", tmp_path / "kernels")
    assert "none.json: expected a readable file, got No such file or directory" in line


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


def test_control_characters_of_the_input_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(topologies.document([[topologies.DENSE]]) | {"\x1b[31m\u202e\n": 1}))
    assert r"unknown key '\x1b[31m\u202e\n'" in fails(capsys, 2, "inspect", file)
    name = tmp_path / "a\x1b[2J\nb"
    assert r"a\x1b[2J\nb: expected a readable file" in fails(capsys, 2, "inspect", name)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PackageError("kernels", "a new folder", "a file", "choose another"), 2, "kernels: expected a new folder"),
        (
            BuildError("g++", "status 0", "status 1:\nerror: \x1b[1mno\x1b[0m", "read it"),
            1,
            r"\nerror: \x1b[1mno\x1b[0m",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, "/a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), 1, "/a -> /b: Invalid"),
        (OSError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failed_compile_has_its_status(
    error: BaseException,
    status: int,
    words: str,
    topology_file: Path,
    compiler: Compiler,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler.error = error
    assert words in fails(capsys, status, "compile", topology_file, "--out", topology_file.parent / "kernels")


def test_an_error_of_ours_keeps_its_traceback(topology_file: Path, compiler: Compiler) -> None:
    compiler.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["compile", str(topology_file), "--out", str(topology_file.parent / "kernels")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "tpu"], "target 'tpu': expected cpu, cuda:<compute capability>"),
        (["--target", "cuda:61"], "target cuda:61: expected cuda: with one of 80, 86, 89, 90, 100, 120, got 61"),
        (["--target", "cuda:90\x1b[31m"], r"cuda:90\x1b[31m"),
        (["--target", "cuda:90", "--dtype", "fp32"], "dtype fp32: expected one of bf16, fp16 for cuda:90"),
        (["--target", "cpu", "--target", "hip:gfx942", "--dtype", "fp32"], "for hip:gfx942"),
    ],
)
def test_compile_refuses_targets_and_dtypes(
    options: list[str], words: str, topology_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = topology_file.parent / "kernels"
    assert words in fails(capsys, 2, "compile", topology_file, "--out", out, *options)
    assert not out.exists()


def test_compile_refuses_an_out_that_is_a_file(topology_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = topology_file.read_bytes()
    assert "topology.json" in fails(capsys, 2, "compile", topology_file, "--out", topology_file)
    assert topology_file.read_bytes() == before


@pytest.mark.parametrize("out", [".", "..", "../new/.."])
def test_compile_refuses_the_current_folder(
    out: str, topology_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = topology_file.parent / "new"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "the current folder or one above it" in fails(capsys, 2, "compile", topology_file, "--out", out)


def test_compile_refuses_a_folder_with_other_things(topology_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, "compile", topology_file, "--out", topology_file.parent)
    assert "expected a kernel package, an empty folder or nothing" in line
    assert topology_file.exists()


def test_compile_reports_an_out_that_cannot_be_made(topology_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 1, "compile", topology_file, "--out", topology_file / "kernels")
    assert line == f"surgeon: {topology_file}: File exists\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_compile_reports_an_out_that_may_not_be_written(
    topology_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = topology_file.parent / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in fails(capsys, 1, "compile", topology_file, "--out", closed / "kernels")


@pytest.mark.parametrize("program", [cli.main, cli.main_compile])
def test_version(program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["--version"]) == 0
    assert capsys.readouterr().out == f"surgeon {importlib.metadata.version('surgeon')}\n"


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
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
        "import sys, time, surgeon.compiler.pipeline as pipeline\n"
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
    """The top names of the modules that a fresh process has imported when a command ends with `status`."""
    program = (
        "import sys\nfrom surgeon.compiler.cli import main\nstatus = main()\nprint(*sys.modules)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["compile", "--help"], 0), ([], 2), (["compile", "t", "--out", ""], 2)]
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


class Screen:
    """A standard error that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        self.text = ""
        self.is_terminal = is_terminal

    encoding = "utf-8"

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as progress:
        assert progress is not None
        progress("building [cpu]", 2, 7)
    assert "building [cpu]" in screen.text
    assert "2/7" in screen.text


def test_progress_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as progress:
        assert progress is None
    assert screen.text == ""
