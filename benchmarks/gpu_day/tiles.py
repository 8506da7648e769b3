"""The third stage: tiles that were compiled beforehand, checked and timed; the best become a table for compiling."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_day.calls import block_mask, milliseconds
from gpu_day.day import Day, Row, Tell
from gpu_day.packages import candidate_name, candidates
from inputs.topologies import Shape, inputs
from measure.checked import WrongResultError, checked
from surgeon.compiler.specs.tiles import PHASES, Tile, tiles_json, tiles_of
from surgeon.runtime import load
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.package.target import Target


def tiles(day: Day, packages: Path, tell: Tell) -> None:
    """Tells each candidate's milliseconds for many queries and for one; one that fails is told with its fault."""
    for shape in day.shapes:
        topology = day.topology(shape, day.tuned_length, day.densities[0])
        mask = block_mask(day, topology)
        for index, pair in enumerate(candidates(day, shape)):
            row: Row = {"head_dim": shape.head_dim, "candidate": index}
            try:
                package = load(packages / candidate_name(shape, index), strict=True, device=day.device)
                for phase, tile, q_length in zip(PHASES, pair, (day.tuned_length, 1), strict=True):
                    row[f"{phase}_tile"] = _numbers(tile)
                    tensors = inputs(shape, q_length, day.tuned_length, day.torch_dtype, device=day.device)
                    call = partial(package.attention, 0, *tensors)
                    row[f"{phase}_error"] = checked(phase, mask, shape.block_size, tensors, call())
                    row[f"{phase}_ms"] = milliseconds(day, {"ours": call}, phase == "decode", 10)["ours"]
            except (SurgeonError, WrongResultError) as error:
                row["fault"] = str(error)[:400]
            tell(row)


def best_tiles(day: Day, rows: Sequence[Mapping[str, Any]], source: str) -> str:
    """The table of the fastest tiles, as `surgeon compile --tiles` reads it."""
    target = Target.parse(day.target)
    chosen = tiles_of(target)
    for shape in day.shapes:
        for phase in PHASES:
            if tried := _timed(rows, shape, phase):
                fastest = min(tried, key=lambda row: float(row[f"{phase}_ms"]))
                chosen = chosen.with_tile(phase, shape.head_dim, Tile(*fastest[f"{phase}_tile"]))
    return tiles_json({target: chosen}, source)


def _timed(rows: Sequence[Mapping[str, Any]], shape: Shape, phase: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["head_dim"] == shape.head_dim and f"{phase}_ms" in row]


def _numbers(tile: Tile | None) -> list[int | str] | None:
    return list(dataclasses.astuple(tile)) if tile else None
