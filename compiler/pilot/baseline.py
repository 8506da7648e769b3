"""Equal windows as dense as a topology: a pilot's baseline."""

import dataclasses

from surgeon.compiler.learn.patterns.windows import uniform_windows
from surgeon.compiler.topology.pairs import causal_pairs
from surgeon.compiler.topology.topology import Topology, WindowHead, mean_density


def window_baseline(topology: Topology, length: int) -> Topology:
    """Equal windows and a sink over the same layers, as dense as the topology is at this many tokens.

    The density is met from below, to within one head's next block. If it leaves no room for a sink, there is none.

    Raises:
        TopologyError: the length is beyond the topology's own, and the topology refuses that.
    """
    blocks = _blocks(topology, length)
    density = density_at(topology, length)
    sink = 1 if density * causal_pairs(blocks) >= 2 * blocks - 1 else 0
    windows = uniform_windows(len(topology.covered), topology.model.num_attention_heads, blocks, sink, density)
    rows = iter(windows.tolist())
    layers = tuple(
        tuple(WindowHead(sink, window) for window in next(rows)) if heads else () for heads in topology.layers
    )
    return dataclasses.replace(
        topology,
        num_blocks=blocks,
        dendrograms=(),
        layers=layers,
        beyond="window",
        router=None,
        provenance={"method": "window", "density_of": topology.sha256},
    )


def density_at(topology: Topology, length: int) -> float:
    """Visible pairs over causal pairs of blocks at this many tokens, over the covered layers' heads.

    Raises:
        TopologyError: the length is beyond the topology's own, and the topology refuses that.
    """
    return mean_density(topology, _blocks(topology, length))


def _blocks(topology: Topology, length: int) -> int:
    return -(-length // topology.block_size)
