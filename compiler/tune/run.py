"""Chooses tiles for one layer's schedules on this machine's GPU."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.compiler.kernels.gpu.compile import check_triton
from surgeon.compiler.specs.specialize import check_head_dim
from surgeon.compiler.specs.tiles import PHASES, TargetTiles, tiles_of
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import DenseHead, Topology
from surgeon.compiler.tune.candidates import decode_candidates, other_programs, prefill_candidates
from surgeon.compiler.tune.clock import timed
from surgeon.compiler.tune.search import Trial, Tuning, tune
from surgeon.compiler.tune.trial import Bench, device_here
from surgeon.runtime.errors import TopologyError, short_repr
from surgeon.runtime.package.target import Target


@dataclass(frozen=True)
class Tuned:
    """A tile table with the tiles chosen here, the device they were timed on, and the trials of each head size."""

    tiles: Mapping[Target, TargetTiles]
    target: Target
    device: str
    tunings: Mapping[int, Tuning]


def tune_here(
    topology: Topology,
    layer: int,
    head_dims: Sequence[int] | None = None,
    start: Mapping[Target, TargetTiles] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Times candidates on one layer's schedules for each head size, by default the topology's own.

    `start` takes precedence over the built-in tiles.

    Raises:
        TopologyError: the topology has no such layer.
        TargetError: there is no GPU, Surgeon does not know it, Triton is missing, or no candidate works.
    """
    timed_layer = one_layer(topology, layer)
    device, target = device_here()
    check_triton(target)  # reported now rather than as every candidate's fault
    start = start or {}
    tiles = tiles_of(target, start)
    sizes = tuple(dict.fromkeys(head_dims or (topology.model.head_dim,)))
    for head_dim in sizes:
        check_head_dim(head_dim)
    tunings: dict[int, Tuning] = {}
    with tempfile.TemporaryDirectory() as work:
        for head_dim in sizes:
            bench = Bench(with_head_dim(timed_layer, head_dim), target, device, _milliseconds, Path(work), jobs)
            group = topology.model.num_attention_heads // topology.model.num_key_value_heads
            counted = _counted(tiles, head_dim, group, progress)
            tunings[head_dim] = tune(tiles, head_dim, group, bench.measure, counted)
            tiles = tunings[head_dim].tiles
    return Tuned({**start, target: tiles}, target, torch.cuda.get_device_name(device), tunings)


def one_layer(topology: Topology, layer: int) -> Topology:
    """Reduces a topology to the schedules of one of its layers, which are enough to time tiles: none of them chooses.

    Raises:
        TopologyError: the topology covers no such layer.
    """
    if layer not in topology.covered:
        covered = short_repr(topology.covered)
        raise TopologyError("--layer", f"a layer that the topology covers, of {covered}", str(layer), "name another")
    model = dataclasses.replace(topology.model, num_hidden_layers=1)
    heads = tuple(
        head if isinstance(head, DenseHead) else dataclasses.replace(head, route=0) for head in topology.layers[layer]
    )
    return dataclasses.replace(topology, model=model, layers=(heads,), router=None)


def with_head_dim(topology: Topology, head_dim: int) -> Topology:
    """A topology with the same schedules for heads of another size."""
    return dataclasses.replace(topology, model=dataclasses.replace(topology.model, head_dim=head_dim))


def _counted(
    tiles: TargetTiles, head_dim: int, heads_per_kv_head: int, progress: Progress | None
) -> Callable[[Trial], None]:
    """Reports each trial of a head size to `progress`."""
    grids = prefill_candidates(tiles, head_dim, heads_per_kv_head), decode_candidates(tiles, head_dim)
    total = sum(len(grid) + len(other_programs(phase, grid[0])) for phase, grid in zip(PHASES, grids, strict=True))
    done: list[Trial] = []

    def tried(trial: Trial) -> None:
        done.append(trial)
        if progress is not None:
            progress(f"head size {head_dim}: {trial.phase}", len(done), total)

    return tried


def _milliseconds(call: Callable[[], object], without_host: bool) -> float:
    return timed({"call": call}, graphs=without_host)["call"]
