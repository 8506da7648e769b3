"""The path of a topology through the compiler's rooms: forward, and into each room at most twice."""

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from surgeon.compiler import Topology, compile_package
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.runtime.package.segment_table import SegmentTable
from topologies import random_topology

WAY = ("topology", "schedule", "specs", "kernels", "package")
"""The rooms that transform a topology, in the order of the stages."""


def room_of(frame: FrameType) -> str:
    _, _, below = str(frame.f_globals.get("__name__", "")).partition("surgeon.compiler.")
    return below.partition(".")[0]


def rooms_entered(topology: Topology, targets: tuple[str, ...], out: Path) -> list[str]:
    """The rooms whose functions a compile calls from outside them, in order.

    The methods of a stage's result go with it, and are not counted.
    """
    entered: list[str] = []

    def called(frame: FrameType, event: str, _argument: object) -> None:
        room, name = room_of(frame), frame.f_code.co_qualname
        if event != "call" or room not in WAY or "." in name:
            return
        if frame.f_back is not None and room_of(frame.f_back) != room and entered[-1:] != [room]:
            entered.append(room)

    sys.setprofile(called)
    try:
        compile_package(topology, out, targets=targets, dtypes=("bf16",))
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize("targets", [("cpu",), ("cpu", "cuda:90", "hip:gfx942")])
def test_a_compile_enters_each_room_at_most_twice(targets: tuple[str, ...], tmp_path: Path) -> None:
    topology = random_topology(
        np.random.default_rng(0), num_layers=2, num_heads=4, num_kv_heads=2, num_blocks=8, head_dim=64, block_size=32
    )
    compile_package(topology, tmp_path / "first", targets=targets, dtypes=("bf16",))  # and keep the compilers' output
    entered = rooms_entered(topology, targets, tmp_path / "second")
    print(" -> ".join(entered))
    assert entered[0] == entered[-1] == "package"  # which refuses anything in the way at once
    assert {room: entered.count(room) for room in WAY if entered.count(room) > 2} == {}


def test_targets_share_the_tables_of_their_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = random_topology(
        np.random.default_rng(0), num_layers=2, num_heads=4, num_kv_heads=2, num_blocks=8, head_dim=64, block_size=32
    )
    made: list[tuple[LayerSchedule, TableShape]] = []

    def counted(shape: TableShape, layer: LayerSchedule) -> SegmentTable:
        made.append((layer, shape))
        return table_of(shape, layer)

    table_of = TableShape.of
    monkeypatch.setattr(TableShape, "of", counted)
    compile_package(topology, tmp_path / "kernels", targets=("cuda:90", "hip:gfx942"), dtypes=("bf16",))
    assert made
    assert len(made) == len(set(made))
