"""The lengths, blocks and densities that a pattern can have: known from numbers alone, before anything is read."""

from surgeon.compiler.topology.pairs import causal_pairs, window_pairs
from surgeon.runtime.errors import TopologyError

_SIZES = (64, 32, 16)  # tokens
_READ_BLOCKS = 6


def suited_block(density: float, length: int, measured_length: int | None = None) -> int:
    """The size of blocks, in tokens, for a density and lengths: the largest of which a row reads six on average.

    Windows are whole blocks: of fewer, heads differ too little. Measured: with 10% of 2,048 tokens, windows of blocks
    of 16 lose half as much perplexity as those of 32; with 25%, blocks of 32 lose next to nothing.
    """
    shortest = min(length, measured_length or length)
    for size in _SIZES:
        blocks, rest = divmod(shortest, size)
        if not rest and not length % size and density * (blocks + 1) / 2 >= _READ_BLOCKS:
            return size
    return _SIZES[-1]


def blocks_of(length: int, block_size: int, option: str = "--length") -> int:
    """The number of blocks in a sequence of `length` tokens; an error names the `option` that gave it.

    Raises:
        TopologyError: the length is not a multiple of the block.
    """
    if length < block_size or length % block_size:
        raise TopologyError(
            option, f"a multiple of the block, {block_size} tokens", str(length), "choose another length or block"
        )
    return length // block_size


def measured_blocks(length: int, measured_length: int | None, block_size: int, clusters: bool = False) -> int:
    """The number of blocks in the sequences that are measured; with `clusters` they must be as long as `length`.

    Raises:
        TopologyError: a length is not a multiple of the block, or the lengths differ and clusters are wanted.
    """
    blocks = blocks_of(length, block_size)
    measured = blocks if measured_length is None else blocks_of(measured_length, block_size, "--measured-length")
    if clusters and blocks != measured:
        lengths = f"{length} and {measured_length}"
        raise TopologyError("clusters", "equal --length and --measured-length", lengths, "choose one length")
    return measured


def check_reachable(blocks: int, sink: int, density: float) -> None:
    """Checks that a window of one block and the sink leave the density in reach.

    Raises:
        TopologyError: they alone exceed it.
    """
    least = window_pairs(blocks, sink, 1) / causal_pairs(blocks)
    if density * causal_pairs(blocks) < window_pairs(blocks, sink, 1):
        raise TopologyError(
            "--density",
            f"at least {least:.4f}: the sink and every block itself",
            f"{density}",
            "raise the density, use smaller blocks, or learn for a greater length",
        )
