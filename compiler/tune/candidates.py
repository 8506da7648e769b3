"""The tiles worth trying on a target: all of a small grid that can fit its processors, in each variant."""

import dataclasses
import itertools

from surgeon.compiler.specs.tiles import HEADS, PERSISTENT, TargetTiles, Tile, loads_of
from surgeon.compiler.system.powers import padded

_QUERIES = (64, 128)
_KEYS = (32, 64, 128)
_WARPS = (4, 8)
_STAGES = (2, 3, 4)
_DECODE_KEYS = (16, 32, 64, 128)
_DECODE_WARPS = (2, 4, 8)
_DECODE_STAGES = (1, 2, 3, 4)
_ELEMENT_BYTES = 2
_MAX_THREADS = 1024


def prefill_candidates(tiles: TargetTiles, head_dim: int, heads_per_kv_head: int) -> tuple[Tile, ...]:
    """Lists tiles for many queries, the present one first; the heads of a program divide a KV head's.

    All are persistent or none is, as the present one: see `other_programs`.
    """
    present = tiles.listed("prefill", head_dim)
    found = _fitting(tiles, head_dim, present, "prefill", _QUERIES, _KEYS, _WARPS, _STAGES)
    possible = (tile for tile in found[1:] if tile.keys <= tile.queries and heads_per_kv_head % tile.heads == 0)
    return (present, *possible)


def decode_candidates(tiles: TargetTiles, head_dim: int) -> tuple[Tile, ...]:
    """Lists tiles for one query per sequence, the present one first; the rows, a KV head's query heads, stay."""
    present = tiles.listed("decode", head_dim)
    return _fitting(tiles, head_dim, present, "decode", (present.queries,), _DECODE_KEYS, _DECODE_WARPS, _DECODE_STAGES)


def other_programs(phase: str, tile: Tile) -> tuple[Tile, ...]:
    """The tile with persistent programs instead of one for each task, or the other way, if the phase has both.

    What that gains depends on the tasks more than on the tile, so that trying it with the fastest one is enough.
    """
    others = (kind for kind in PERSISTENT[phase] if kind != tile.persistent)
    return tuple(dataclasses.replace(tile, persistent=kind) for kind in others)


def _fitting(tiles: TargetTiles, head_dim: int, present: Tile, phase: str, *grid: tuple[int, ...]) -> tuple[Tile, ...]:
    device = tiles.device
    found = [present]
    variants = itertools.product(loads_of(tiles.target, phase), HEADS[phase])
    for (loads, heads), numbers in itertools.product(variants, itertools.product(*grid)):
        queries, keys, warps, stages = numbers
        tile = Tile(queries // heads, keys, warps, stages, loads, heads, present.persistent)
        # Compilers need more memory than the keys and values in flight, so they may still refuse what passes here.
        under_way = 2 * stages * keys * padded(head_dim) * _ELEMENT_BYTES
        if tile != present and under_way <= device.shared_bytes and warps * device.warp_size <= _MAX_THREADS:
            found.append(tile)
    return tuple(found)
