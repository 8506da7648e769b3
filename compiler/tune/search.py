"""The choice of tiles: every candidate is measured by a given function, and the fastest is kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgeon.compiler.specs.tiles import TargetTiles, Tile
from surgeon.compiler.tune.candidates import decode_candidates, other_programs, prefill_candidates
from surgeon.runtime.errors import SurgeonError, TargetError

Measure = Callable[[TargetTiles, str], float]
"""Compiles with these tiles, checks the results of a phase, "prefill" or "decode", and returns its milliseconds.

It raises a SurgeonError for tiles that do not compile, do not load, or compute wrong results.
"""


@dataclass(frozen=True)
class Trial:
    """One candidate for a phase: its milliseconds, or None and the fault."""

    phase: str
    tile: Tile
    milliseconds: float | None
    fault: str = ""


@dataclass(frozen=True)
class Tuning:
    """The chosen tiles, and all trials, the present tile first in each phase."""

    tiles: TargetTiles
    trials: tuple[Trial, ...]

    def best(self, phase: str) -> Trial:
        """The fastest candidate of a phase; of equally fast ones, the one tried first."""
        working = [trial for trial in self.trials if trial.phase == phase and trial.milliseconds is not None]
        return min(working, key=lambda trial: trial.milliseconds or math.inf)


def tune(
    tiles: TargetTiles, head_dim: int, heads_per_kv_head: int, measure: Measure, tried: Callable[[Trial], None]
) -> Tuning:
    """Chooses a target's tiles for one head size: first those for many queries, then, with them, those for one.

    The fastest is also tried with the other kind of programs.

    `tried` is called after each trial.

    Raises:
        TargetError: no candidate of a phase works.
    """
    trials: list[Trial] = []
    for phase, candidates in (
        ("prefill", prefill_candidates(tiles, head_dim, heads_per_kv_head)),
        ("decode", decode_candidates(tiles, head_dim)),
    ):
        found = _measured(tiles, head_dim, phase, candidates, measure, tried)
        if all(trial.milliseconds is None for trial in found):
            raise TargetError(
                f"{phase} on {tiles.target}, head size {head_dim}",
                "a tile that works",
                f"none of {len(found)}; the present one: {found[0].fault}",
                "check the device with pytest -m gpu",
            )
        others = other_programs(phase, Tuning(tiles, tuple(found)).best(phase).tile)
        found += _measured(tiles, head_dim, phase, others, measure, tried)
        tiles = tiles.with_tile(phase, head_dim, Tuning(tiles, tuple(found)).best(phase).tile)
        trials += found
    return Tuning(tiles, tuple(trials))


def _measured(
    tiles: TargetTiles,
    head_dim: int,
    phase: str,
    candidates: Sequence[Tile],
    measure: Measure,
    tried: Callable[[Trial], None],
) -> list[Trial]:
    found = []
    for tile in candidates:
        try:
            trial = Trial(phase, tile, measure(tiles.with_tile(phase, head_dim, tile), phase))
        except SurgeonError as error:
            trial = Trial(phase, tile, None, str(error))
        found.append(trial)
        tried(trial)
    return found
