"""The day on a card, rehearsed with its own compiled kernels: loaded and launched through a stand-in for the driver.

Only the card is missing: the tensors are the CPU's, and what a kernel would write is filled in from the definition.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reference
from gpu_day import run as runner
from gpu_day.bars import bars
from gpu_day.day import DAYS, REHEARSAL
from gpu_day.kept import keep
from gpu_day.packages import candidates, prepare
from gpu_standin import FakeStream, Standin, standin_folder
from inputs.topologies import Shape
from surgeon.compiler import read_topology
from surgeon.compiler.specs.tiles import Tile, read_tiles
from surgeon.runtime.kernels.devices import DeviceKernels
from surgeon.runtime.kernels.gpu.kernels import open_gpu
from surgeon.runtime.kernels.gpu.open_driver import open_driver
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.interface import PREFILL
from surgeon.runtime.package.reader import PackageFiles

pytest.importorskip("triton")

SHAPE = Shape(heads=4, kv_heads=2, head_dim=64, block_size=64)
VARIANTS = (Tile(64, 64, 4, 3, "descriptors"), Tile(32, 32, 4, 2, heads=2), Tile(64, 32, 4, 2, persistent=True))
DAY = replace(
    REHEARSAL,
    target="cuda:90",
    dtype="bf16",
    shapes=(SHAPE,),
    densities=(0.5,),
    batches=(1, 2),
    candidates=4,
    prefill_tiles=VARIANTS,
)
STAGES = ("smoke", "tiles", "speed", "model")  # the suite's own tests skip themselves without a card
LAUNCHES = ("cuLaunchKernel", "cuLaunchKernelEx")


class Filled:
    """A package's kernels on a stand-in for a GPU; `attend` launches them, and then fills in their result."""

    def __init__(self, files: PackageFiles, strict: bool) -> None:
        self._kernels = open_gpu(files, torch.device("cuda", 0), strict)
        self._topology = read_topology(files.folder / "topology.json")
        self.dtypes = self._kernels.dtypes

    def attend(self, layer: int, operands: Operands, lse: torch.Tensor | None, first_kv_head: int) -> torch.Tensor:
        out = self._kernels.attend(layer, operands, lse, first_kv_head)
        q, k, v = operands.q, operands.k, operands.v
        places = (
            [default] * len(q) if place is None else place.tolist()
            for place, default in ((operands.position, k.shape[2] - q.shape[2]), (operands.cache_leftpad, 0))
        )
        rows = operands.dense_rows, operands.tokens_ahead
        found, _ = reference.attention(self._topology, layer, q, k, v, *places, operands.scale, *rows)
        return out.copy_(found)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    prepare(DAY, folder)
    return folder


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """A machine with a Hopper card, as far as the launcher asks."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: FakeStream(7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, _device: tensor)
    monkeypatch.setattr(DeviceKernels, "_load", lambda self, _device: Filled(self._files, self._strict))
    found = Standin(standin_folder(), "cuda")
    found.log()
    yield found
    found.log()


def in_this_process(name: str, stage: str, packages: Path, out: Path, _limit: int) -> dict[str, Any]:
    """A stage without a process of its own, since the stand-in is in this one."""
    started, rows = time.perf_counter(), out / "rows"
    with pytest.MonkeyPatch.context() as patch:  # the smoke call has its process record launches from then on
        patch.setattr("surgeon.runtime.kernels.gpu.kernels.open_driver", open_driver)
        runner.tell_rows(stage, name, packages, rows)
    seconds = round(time.perf_counter() - started, 1)
    return {"status": "done", "seconds": seconds, "rows": runner.read_rows(rows)}


def test_the_days_stages_launch_their_kernels(
    packages: Path, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DAYS, "standin", DAY)
    monkeypatch.setattr(runner, "run_stage", in_this_process)
    out = tmp_path / "results"
    results = runner.run("standin", packages, out, STAGES)
    smoke, tiles, speed, model = (results["stages"][name]["rows"] for name in STAGES)

    assert [row["phase"] for row in smoke if "phase" in row] == ["prefill", "decode"]
    told = [row["launching"] for row in smoke if "launching" in row]
    assert told == ["attention_000", "decode", "combine"]
    assert all(row["prefill_error"] < 5e-3 and "fault" not in row for row in tiles)
    assert [row["prefill_tile"] for row in tiles] == [list(vars(pair[0]).values()) for pair in candidates(DAY, SHAPE)]
    assert [(row["phase"], row["batch"]) for row in speed] == [("prefill", 1), ("decode", 1), ("decode", 2)]
    assert [row["what"] for row in model] == ["first token", "decoded token"]
    assert bars(results["stages"], DAY.lengths)[0].met  # the errors
    assert list(read_tiles(out / "tiles.json"))  # the fastest of the four

    calls = standin.log()
    launched = [call for call in calls if call["call"] in LAUNCHES]
    assert len(launched) > len(told)
    assert_every_launch_is_within_the_limits(launched)
    assert any(int(call["values"][-2], 16) for call in launched)  # scratch memory, for descriptors
    prefills = [call for call in launched if len(call["values"]) == len(PREFILL.binary_arguments)]
    assert {call["grid"][0] for call in prefills} == {
        SHAPE.heads,
        SHAPE.heads // 2,
    }  # a program of one head, and of two
    shared = [call for call in launched if len(call["values"]) == len(PREFILL.persistent.binary_arguments)]
    tasks = SHAPE.heads * (DAY.tuned_length // 64 + 1)
    assert {tuple(call["grid"]) for call in shared} == {(tasks, 1, 1)}  # fewer than the card holds programs
    with pytest.raises(SystemExit, match="got a rehearsal"):
        keep(out)
    print({name: found["seconds"] for name, found in json.loads((out / "results.json").read_text())["stages"].items()})


def assert_every_launch_is_within_the_limits(launched: Sequence[dict[str, Any]]) -> None:
    for call in launched:
        assert 0 < call["block"][0] <= 1024
        assert call["shared"] <= 232_448
        assert all(0 < size < 2**16 for size in call["grid"][1:])
