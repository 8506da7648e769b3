"""`surgeon compile`: the arguments it passes on, its output, and its refusals."""

import errno
import hashlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import surgeon.compiler
from command_line import fails
from surgeon.compiler.cli import main as cli
from surgeon.compiler.specs.tiles import read_tiles
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import BuildError, PackageError
from surgeon.runtime.package.manifest import FileEntry, KernelEntry, Manifest

TILES = Path(surgeon.compiler.__file__).parent / "specs" / "tiles.json"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class Compiler:
    """Stands in for compile_package: keeps its arguments, and makes the one file that the command line reads."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, topology: Topology, out: Path, **arguments: Any) -> Path:
        self.calls.append({"topology": topology, "out": out} | arguments)
        if self.error is not None:
            raise self.error
        kernel = KernelEntry("cpu", "fp32", (0,), "attention_000", "cpu/kernels.so", "f", (), None, ())
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


def test_compile_prints_what_it_made_and_its_identity(
    topology_file: Path, compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    out = topology_file.parent / "kernels"
    assert cli.main(["compile", str(topology_file), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    size = 1000 + (out / "manifest.json").stat().st_size
    assert printed.out.startswith(f"{out}: 1 kernel for cpu, {size:,} bytes, ")
    identity = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    assert printed.out.splitlines()[1:] == [f"id {identity}"]
    assert printed.err == ""


def test_compile_hands_its_options_on(topology_file: Path, compiler: Compiler) -> None:
    out = topology_file.parent / "kernels"
    targets = ["--target", "cuda:90", "--target", "cpu", "--target", "cuda:90"]
    dtypes = ["--dtype", "fp16", "--dtype", "bf16"]
    others = ["--jobs", "3", "--dump", str(out / "dump"), "--tiles", str(TILES), "--paged"]
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
        "paged": True,
    }


def test_compile_leaves_defaults_to_the_compiler(topology_file: Path, compiler: Compiler) -> None:
    assert cli.main(["compile", str(topology_file), "--out", str(topology_file.parent / "kernels")]) == 0
    (call,) = compiler.calls
    assert (call["targets"], call["dtypes"], call["jobs"], call["dump"]) == (("cpu",), None, None, None)
    assert call["paged"] is False


def test_compile_json(topology_file: Path, compiler: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    out = topology_file.parent / "kernels"
    assert cli.main(["compile", str(topology_file), "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["path", "id", "topology_sha256", "targets", "kernels", "bytes", "seconds"]
    assert made["path"] == str(out)
    assert made["targets"] == ["cpu"]
    assert made["kernels"] == 1
    assert made["topology_sha256"] == compiler.calls[0]["topology"].sha256


def test_compile_refuses_a_missing_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, "compile", tmp_path / "none.json", "--out", tmp_path / "kernels")
    assert "none.json: expected a readable file, got No such file or directory" in line


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
        (OSError(errno.ENOSPC, "No space left on device"), 1, "surgeon compile: No space left on device; free some"),
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


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ZeroDivisionError("a bug\nand more"),
            "ZeroDivisionError: a bug; nobody foresaw this: set SURGEON_TRACEBACK=1",
        ),
        (AssertionError(), "AssertionError: AssertionError; "),
        (RuntimeError("\x1b[31m" + "x" * 10_000), r"RuntimeError: \x1b[31mxxx"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (Panic("index out of bounds"), "Panic: index out of bounds"),
        (MemoryError(), "expected enough memory, got too little; free some memory, or use a machine with more"),
    ],
)
def test_whatever_is_raised_is_one_line_unless_a_traceback_is_asked_for(
    error: BaseException,
    words: str,
    topology_file: Path,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler.error = error
    arguments = ["compile", str(topology_file), "--out", str(topology_file.parent / "kernels")]
    line = fails(capsys, 1, *arguments)
    assert line.startswith("surgeon: surgeon compile: ")
    assert words in line
    assert len(line) < 500
    assert cli.main_compile(arguments[1:]) == 1
    assert capsys.readouterr().err.startswith("surgeon: surgeon-compile: ")
    monkeypatch.setenv("SURGEON_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space, or use another disk"),
        (errno.EDQUOT, "free some space, or use another disk"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EROFS, "use a place that can be written"),
    ],
)
def test_an_error_of_the_system_says_where_and_what_to_do(
    code: int, remedy: str, topology_file: Path, compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler.error = OSError(code, os.strerror(code), "/a/b")
    line = fails(capsys, 1, "compile", topology_file, "--out", topology_file.parent / "kernels")
    assert line.startswith(f"surgeon: /a/b: {os.strerror(code)}; ")
    assert remedy in line


@pytest.mark.parametrize("options", [[], ["--dump", "dump"]], ids=["package", "dump"])
def test_a_disk_that_fills_up_is_named(
    options: list[str], topology_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may have only a few bytes: writing it fails as on a full disk, with an error that names no file."""
    monkeypatch.chdir(topology_file.parent)
    monkeypatch.setenv("SURGEON_CACHE", str(topology_file.parent / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python takes a file cut short for written
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        line = fails(capsys, 1, "compile", topology_file, "--out", "kernels", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ": File too large; raise the limit on the size of files (ulimit -f), or use another disk" in line
    assert line.startswith(f"surgeon: {'dump/1-topology.json' if options else tempfile.gettempdir()}")
    assert not Path("kernels").exists()


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
    out = topology_file / "kernels"
    line = fails(capsys, 2, "compile", topology_file, "--out", out)
    assert line.startswith(f"surgeon: {out}: expected a place in a folder that exists, got none; ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_compile_reports_an_out_that_may_not_be_written(
    topology_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = topology_file.parent / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in fails(capsys, 2, "compile", topology_file, "--out", closed / "kernels")
