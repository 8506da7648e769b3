"""The tiling of a prefill kernel, as the numbers that its template needs."""

from dataclasses import dataclass

from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.system.powers import log2, padded


@dataclass(frozen=True)
class Tiling:
    """The tiling of a kernel: tokens per tile of queries and of keys, and the padded head size.

    A tile of queries lies within one row of blocks or spans `rows` of them, 2**`rows_shift` tokens. A tile of keys lies
    within one block or spans `blocks` of them, 2**`unit_shift` tokens. A program has a tile of queries of each of
    `heads` heads, `tile_rows` in all, of which 2**`reader_shift` neighbours see the same blocks. All sizes are powers
    of two, `*_shift` their logarithms.
    """

    query_tile: int
    key_tile: int
    padded_head_dim: int
    block_shift: int
    query_tile_shift: int
    key_tile_shift: int
    rows: int
    blocks: int
    rows_shift: int
    unit_shift: int
    heads: int
    tile_rows: int
    reader_shift: int

    @property
    def masks_blocks(self) -> bool:
        """True if queries of a program may see different blocks."""
        return self.rows * self.heads > 1


def tiling_of(spec: GpuSpec) -> Tiling:
    """Derives the tiling from a kernel's tile, block size and head size."""
    block_size, tile = spec.schedule.block_size, spec.prefill
    rows, blocks = max(1, tile.queries // block_size), max(1, tile.keys // block_size)
    return Tiling(
        query_tile=tile.queries,
        key_tile=tile.keys,
        padded_head_dim=padded(spec.head_dim),
        block_shift=log2(block_size),
        query_tile_shift=log2(tile.queries),
        key_tile_shift=log2(tile.keys),
        rows=rows,
        blocks=blocks,
        rows_shift=log2(rows * block_size),
        unit_shift=log2(blocks * block_size),
        heads=tile.heads,
        tile_rows=tile.rows,
        reader_shift=log2(min(block_size, tile.queries)),
    )
