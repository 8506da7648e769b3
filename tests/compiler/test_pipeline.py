"""The whole compiler: one package from several targets, the same every time, and each stage's product on request."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from surgeon.compiler import compile_package, parse_topology
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import decode_table
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import PackageError, TargetError
from surgeon.runtime.package.reader import read_package
from topologies import build, head, tree, window_topology

TOPOLOGY = window_topology([1, 2], head_dim=32, num_layers=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_compiles_are_equal_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contents(compile_package(TOPOLOGY, tmp_path / "one", targets=["cpu", "cuda:90"], jobs=1))
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    assert contents(compile_package(TOPOLOGY, tmp_path / "two", targets=["cpu", "cuda:90"], jobs=2)) == first


def test_targets_stand_side_by_side(tmp_path: Path) -> None:
    folder = compile_package(TOPOLOGY, tmp_path / "kernels", targets=["cpu", "cuda:90", "cuda:80", "cpu"])
    manifest = read_package(folder).manifest
    assert manifest.targets == ("cpu", "cuda:80", "cuda:90")
    assert {kernel.file for kernel in manifest.kernels} == {
        "cpu/attention.so",
        *(
            f"cuda-{arch}/{name}.{dtype}.cubin"
            for arch in (80, 90)
            for name in ("attention_000", "decode", "combine")
            for dtype in ("bf16", "fp16")
        ),
    }
    assert {tool.name for tool in manifest.tools} > {"surgeon", "triton"}


def test_a_script_without_a_guard_compiles_for_gpus_and_runs_once(tmp_path: Path) -> None:
    (tmp_path / "topology.json").write_text(spelled(TOPOLOGY), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "from surgeon.compiler import compile_package, read_topology\n"
        "print('started')\n"
        "compile_package(read_topology('topology.json'), 'kernels', targets=['cuda:90'], dtypes=['bf16'], jobs=2)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "SURGEON_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "started\n", "")
    assert read_package(tmp_path / "kernels").manifest.targets == ("cuda:90",)


def test_the_package_holds_the_topology(tmp_path: Path) -> None:
    files = read_package(compile_package(TOPOLOGY, tmp_path / "kernels")).files
    assert parse_topology(files["topology.json"].decode()).sha256 == TOPOLOGY.sha256


def test_a_package_for_gpus_holds_the_decoding_tables(tmp_path: Path) -> None:
    files = read_package(compile_package(TOPOLOGY, tmp_path / "kernels", targets=["cuda:90"], dtypes=["bf16"])).files
    tables = safetensors.numpy.load(files["tables.safetensors"])
    expected = decode_table(schedule_layers(TOPOLOGY)[0])
    for part in ("rows", "plans", "segments"):
        assert np.array_equal(tables[f"attention_000.decode.{part}"], getattr(expected, part))


def test_the_package_holds_the_schedule(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    topology = build(
        [[head(0, 2.0, window=2), head(0, 1.0, sink=1), head(0, 2.0, window=2), {"dense": True}]],
        [{"linkage": tree(20, rng, contiguous=False)}],
        num_kv_heads=2,
        num_blocks=20,
    )
    files = read_package(compile_package(topology, tmp_path / "kernels")).files
    tables = safetensors.numpy.load(files["schedule.safetensors"])
    runs, pieces = tables["attention_000.runs"].tolist(), tables["attention_000.pieces"].tolist()
    expected = schedule_layers(topology)[0].heads
    for schedule, (first, end, first_run) in zip(expected, tables["attention_000.heads"].tolist(), strict=True):
        assert pieces[first:end] == [list(map(int, piece)) for piece in schedule.pieces]
        assert runs[first_run : first_run + len(schedule.runs)] == [list(run) for run in schedule.runs]
    assert len(tables["attention_000.heads"]) == 4


def test_an_old_package_is_replaced_whole(tmp_path: Path) -> None:
    folder = compile_package(TOPOLOGY, tmp_path / "kernels", targets=["cpu", "cuda:90"])
    other = window_topology([5], head_dim=32)
    assert compile_package(other, folder) == folder
    assert read_package(folder).manifest.topology_sha256 == other.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_a_failed_compile_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_package(TOPOLOGY, tmp_path / "kernels")
    before = contents(folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgeon.compiler.system.atomic_files._write_durably", fail)
    with pytest.raises(OSError, match="No space left"):
        compile_package(window_topology([5], head_dim=32), folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_without_an_atomic_exchange_the_package_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile_package(TOPOLOGY, tmp_path / "kernels")
    monkeypatch.setattr("surgeon.compiler.system.atomic_files.ctypes.CDLL", lambda *_, **__: object())
    other = window_topology([5], head_dim=32)
    compile_package(other, folder)
    assert read_package(folder).manifest.topology_sha256 == other.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_what_is_no_package_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "thesis.tex").write_text("years of work")
    with pytest.raises(PackageError, match="expected a kernel package, an empty folder or nothing, got something else"):
        compile_package(TOPOLOGY, tmp_path / "kernels")
    assert (tmp_path / "kernels" / "thesis.tex").read_text() == "years of work"


def test_fewer_dtypes(tmp_path: Path) -> None:
    manifest = read_package(compile_package(TOPOLOGY, tmp_path / "kernels", dtypes=["bf16"])).manifest
    assert {kernel.dtype for kernel in manifest.kernels} == {"bf16"}
    with pytest.raises(TargetError):
        compile_package(TOPOLOGY, tmp_path / "kernels", targets=["cuda:90"], dtypes=["fp32"])


def test_dump_writes_every_stage(tmp_path: Path) -> None:
    compile_package(TOPOLOGY, tmp_path / "kernels", dump=tmp_path / "dump")
    dumped = contents(tmp_path / "dump")
    assert parse_topology(dumped["1-topology.json"].decode()).sha256 == TOPOLOGY.sha256
    assert dumped["2-schedule.txt"].decode().splitlines()[:5] == [
        "layer 0",
        "  head 0:",
        "    rows 0..1: blocks 0..row",
        "    rows 2..: blocks 0..0, row+0..row",
        "  head 1:",
    ]
    assert dumped["3-kernels-cpu.txt"] == b"attention_000: layers 0, 1; fp32, bf16, fp16\n"
    package = contents(tmp_path / "kernels")
    for name, data in dumped.items():
        if name.startswith(("4-sources/", "5-binaries/")):
            assert package[name.partition("/")[2]] == data
    built = [name for name in dumped if name.startswith(("4-sources/", "5-binaries/"))]
    assert len(built) == len(package) - 3  # the manifest, the topology, the schedule


@pytest.mark.parametrize(("target", "entry"), [("cuda:90", ".entry attention_000("), ("hip:gfx942", "attention_000:")])
def test_dump_has_the_assembly_of_kernels_for_gpus(tmp_path: Path, target: str, entry: str) -> None:
    pytest.importorskip("triton")
    for folder in ("compiled", "from the cache"):
        compile_package(TOPOLOGY, tmp_path / "kernels", [target], ["fp16"], dump=tmp_path / folder)
        dumped = contents(tmp_path / folder)
        (binary,) = (name for name in dumped if "attention_000.fp16" in name and not name.endswith(".s"))
        assert entry in dumped[f"{binary}.s"].decode()
    assert not any(name.endswith(".s") for name in contents(tmp_path / "kernels"))
