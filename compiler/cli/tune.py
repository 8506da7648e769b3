"""`surgeon tune`: times tiles on this machine's GPU and writes a table for `surgeon compile --tiles`."""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_jobs, add_json, natural, path, positive

if TYPE_CHECKING:
    from surgeon.compiler.specs.tiles import Tile
    from surgeon.compiler.tune.run import Tuned


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topology", metavar="topology.json", help="the topology whose schedules are timed")
    parser.add_argument("--out", required=True, type=path, metavar="FILE", help="the table of tiles to write")
    parser.add_argument("--layer", type=natural, default=0, metavar="N", help="the layer to time; default: 0")
    parser.add_argument(
        "--head-dim",
        action="append",
        type=positive,
        metavar="N",
        help="a head size to choose tiles for; repeatable; default: the topology's",
    )
    parser.add_argument("--tiles", type=path, metavar="FILE", help="a table to start from instead of the built-in one")
    add_jobs(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.system.atomic_files import check_file
    from surgeon.runtime.errors import TargetError

    out: Path = arguments.out
    check_file(out, TargetError)  # reported now rather than after the last candidate

    import torch

    from surgeon.compiler.specs.tiles import read_tiles, tiles_json
    from surgeon.compiler.system.atomic_files import write_file
    from surgeon.compiler.system.terminal import progress_bar
    from surgeon.compiler.topology.read import read_topology
    from surgeon.compiler.tune.run import tune_here

    topology = read_topology(arguments.topology)
    start = read_tiles(arguments.tiles) if arguments.tiles else None
    with progress_bar() as progress:
        found = tune_here(topology, arguments.layer, arguments.head_dim, start, arguments.jobs, progress)
    source = f"surgeon tune on {found.device}, torch {torch.__version__}"
    write_file(out, tiles_json(found.tiles, source))
    return (_json(out, found),) if arguments.json else _lines(out, found)


def _lines(out: Path, found: "Tuned") -> Iterable[str]:
    """The chosen tiles: one line per head size and phase, with the time of the previous tile."""
    for head_dim, tuning in found.tunings.items():
        for phase in ("prefill", "decode"):
            first = next(trial for trial in tuning.trials if trial.phase == phase)
            best = tuning.best(phase)
            before = "the one before failed" if first.milliseconds is None else f"before {first.milliseconds:.3f} ms"
            chosen = f"{found.target} head size {head_dim} {phase}: {_words(best.tile)}"
            yield f"{chosen}, {best.milliseconds:.3f} ms, {before}"
    yield f"{out}: for surgeon compile --tiles"


def _json(out: Path, found: "Tuned") -> str:
    """Every trial, as one JSON object."""
    trials = {
        str(head_dim): [dataclasses.asdict(trial) for trial in tuning.trials]
        for head_dim, tuning in found.tunings.items()
    }
    return json.dumps({"path": str(out), "target": str(found.target), "trials": trials})


def _words(tile: "Tile") -> str:
    numbers = (f"{getattr(tile, name)} {name}" for name in ("queries", "keys", "warps", "stages"))
    return ", ".join((*numbers, *tile.variant))


TUNE = Command("tune", "Choose GPU tiles by timing them on this machine's GPU.", _add_arguments, _run)
