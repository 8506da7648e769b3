"""`surgeon tune`: the arguments' values become a table of tiles."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from surgeon.compiler.specs.specialize import check_head_dim
from surgeon.compiler.specs.tiles import TargetTiles, Tile, read_tiles, tiles_json, tiles_of
from surgeon.compiler.system.terminal import progress_bar
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.compiler.tune.candidates import decode_candidates, prefill_candidates
from surgeon.compiler.tune.clock import timed
from surgeon.compiler.tune.search import Trial, Tuning, tune
from surgeon.compiler.tune.trial import Bench, device_here
from surgeon.runtime.errors import TargetError, TopologyError, shown
from surgeon.runtime.package.target import Target


def run(arguments: argparse.Namespace) -> Iterable[str]:
    """Times candidates on the current GPU and writes the table; returns the lines to print.

    Raises:
        TopologyError: the topology cannot be read, or has no such layer.
        TargetError: there is no GPU, or Surgeon does not know it, or no candidate works.
    """
    out: Path = arguments.out
    if not out.parent.is_dir():  # found out now, and not after the last candidate
        raise TargetError(str(out.parent), "a folder", "nothing", "make it, or name another --out")
    topology = one_layer(read_topology(arguments.topology), arguments.layer)
    start = read_tiles(arguments.tiles) if arguments.tiles else {}
    device, target = device_here()
    tiles = tiles_of(target, start)
    sizes = tuple(dict.fromkeys(arguments.head_dim or (topology.model.head_dim,)))
    for head_dim in sizes:
        check_head_dim(head_dim)
    found: dict[int, Tuning] = {}
    with tempfile.TemporaryDirectory() as work:
        for head_dim in sizes:
            bench = Bench(with_head_dim(topology, head_dim), target, device, _milliseconds, Path(work), arguments.jobs)
            found[head_dim] = _tune(tiles, head_dim, bench)
            tiles = found[head_dim].tiles
    source = f"surgeon tune on {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    out.write_text(tiles_json(start | {target: tiles}, source), encoding="utf-8")
    return (report_json(out, target, found),) if arguments.json else report_lines(out, target, found)


def one_layer(topology: Topology, layer: int) -> Topology:
    """A topology of one of a topology's layers, whose kernels are enough to time tiles.

    Raises:
        TopologyError: it covers no such layer.
    """
    if layer not in topology.covered:
        covered = shown(topology.covered)
        raise TopologyError("--layer", f"a layer that the topology covers, of {covered}", str(layer), "name another")
    model = dataclasses.replace(topology.model, num_hidden_layers=1)
    return dataclasses.replace(topology, model=model, layers=(topology.layers[layer],))


def with_head_dim(topology: Topology, head_dim: int) -> Topology:
    """The same schedules for heads of another size."""
    return dataclasses.replace(topology, model=dataclasses.replace(topology.model, head_dim=head_dim))


def report_lines(out: Path, target: Target, found: Mapping[int, Tuning]) -> Iterable[str]:
    """What was chosen, for people: a line a head size and phase, with the time of the tile before."""
    for head_dim, tuning in found.items():
        for phase in ("prefill", "decode"):
            first = next(trial for trial in tuning.trials if trial.phase == phase)
            best = tuning.best(phase)
            before = "the one before failed" if first.milliseconds is None else f"before {first.milliseconds:.3f} ms"
            yield f"{target} head size {head_dim} {phase}: {_words(best.tile)}, {best.milliseconds:.3f} ms, {before}"
    yield f"{out}: for surgeon compile --tiles"


def report_json(out: Path, target: Target, found: Mapping[int, Tuning]) -> str:
    """Every trial, as one JSON object."""
    trials = {
        str(head_dim): [dataclasses.asdict(trial) for trial in tuning.trials] for head_dim, tuning in found.items()
    }
    return json.dumps({"path": str(out), "target": str(target), "trials": trials})


def _tune(tiles: TargetTiles, head_dim: int, bench: Bench) -> Tuning:
    total = len(prefill_candidates(tiles, head_dim)) + len(decode_candidates(tiles, head_dim))
    done: list[Trial] = []
    with progress_bar() as progress:

        def tried(trial: Trial) -> None:
            done.append(trial)
            if progress is not None:
                progress(f"head size {head_dim}: {trial.phase}", len(done), total)

        return tune(tiles, head_dim, bench.measure, tried)


def _milliseconds(call: Callable[[], object], without_host: bool) -> float:
    return timed({"call": call}, graphs=without_host)["call"]


def _words(tile: Tile) -> str:
    return ", ".join(f"{value} {name}" for name, value in dataclasses.asdict(tile).items())
