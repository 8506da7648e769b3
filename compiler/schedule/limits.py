"""The limits on the work that a topology asks for, checked before any of it is done."""

from surgeon.compiler.schedule.fragments import by_cut
from surgeon.compiler.topology.topology import Head, Topology
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.schedule import MAX_PIECES

MAX_ROWS = 2**27
"""The most rows of blocks that the heads of a topology's distinct layers may have together."""


def check_size(topology: Topology) -> None:
    """Refuses a topology whose schedules would take too much time and memory to make.

    Raises:
        TopologyError: its distinct layers have too many rows or pieces.
    """
    layers = {heads for heads in topology.layers if heads}
    blocks, num_heads = topology.num_blocks, topology.model.num_attention_heads
    if (rows := len(layers) * num_heads * blocks) > MAX_ROWS:
        raise TopologyError(
            "layers",
            f"at most {MAX_ROWS:,} rows of blocks in the distinct layers",
            f"{rows:,}: {len(layers):,} layers of {num_heads:,} heads of {blocks:,} blocks",
            "let more layers be equal, or use larger blocks",
        )
    pieces: dict[Head, int] = {head: 1 for heads in layers for head in heads}
    for cut, sharers in by_cut(topology, pieces):
        for head in sharers:
            pieces[head] = most_pieces(len(cut.fragments(head.window)[0]), blocks)
    number = sum(pieces[head] for heads in layers for head in set(heads))
    if number > MAX_PIECES:
        raise TopologyError(
            "layers",
            f"at most {MAX_PIECES:,} pieces in the schedules of the distinct layers",
            f"up to {number:,}",
            "lower the cuts of heads whose clusters are scattered, let more heads be equal, or use larger blocks",
        )


def most_pieces(fragments: int, num_blocks: int) -> int:
    """The most pieces of a head whose rows fall into so many fragments.

    In a fragment a new piece begins at its first row and where the window passes an end of one of its cluster's
    fragments; two pieces more lie beyond the topology.
    """
    return min(3 * fragments + 2, num_blocks) + 2
