"""How GPU kernels cut their work on each target: the table tiles.json, read and checked."""

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

from surgeon.runtime.errors import TargetError
from surgeon.runtime.target import Target

MIN_BLOCK = 16
"""The smallest block that a GPU kernel takes: the least that a matrix instruction sums over in 16 bits."""

MAX_READERS = 32
"""The most pairs of a row of blocks in a tile of queries and a block in a tile of keys: each has a bit in a mask."""


@dataclass(frozen=True)
class Device:
    """What a target's processors have: threads a warp, and bytes of shared memory that one program may have."""

    warp_size: int
    shared_bytes: int


@dataclass(frozen=True)
class Tile:
    """Queries and keys a tile in tokens, the warps that share it, and how many tiles of keys are under way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Row:
    device: Device
    prefill: dict[int, Tile]
    decode: dict[int, Tile]


def device_of(target: Target) -> Device:
    """The target's processors.

    Raises:
        TargetError: the table does not have the target.
    """
    return _row(target).device


def prefill_tile(target: Target, head_dim: int, block_size: int) -> Tile:
    """The tile of a kernel for many queries: inside one block, or over several whole blocks where they are smaller.

    Raises:
        TargetError: the table does not have the target, or no tile of this head size or these blocks fits it.
    """
    tile = _of_head_dim(_row(target).prefill, target, head_dim)
    if block_size < MIN_BLOCK:
        raise TargetError(
            "block_size",
            f"at least {MIN_BLOCK} tokens for {target}, which its matrix instructions take at once",
            str(block_size),
            "learn the topology with blocks of 32, 64 or 128",
        )
    queries, keys, warps = tile.queries, tile.keys, tile.warps
    while max(1, queries // block_size) * max(1, keys // block_size) > MAX_READERS:
        queries, warps = queries // 2, max(1, warps // 2)
        keys = min(keys, queries)
    return Tile(queries, keys, warps, tile.stages)


def decode_tile(target: Target, head_dim: int, block_size: int, heads_per_kv_head: int) -> Tile:
    """The tile of a kernel for one query a sequence: its rows are the query heads of a KV head.

    Raises:
        TargetError: the table does not have the target, or no tile of this head size fits it.
    """
    tile = _of_head_dim(_row(target).decode, target, head_dim)
    return Tile(max(tile.queries, padded(heads_per_kv_head)), min(tile.keys, block_size), tile.warps, tile.stages)


def padded(number: int) -> int:
    """The power of two that holds a number, as all sizes inside a kernel are."""
    return 1 << (number - 1).bit_length()


def _of_head_dim(tiles: dict[int, Tile], target: Target, head_dim: int) -> Tile:
    fitting = [size for size in tiles if size >= padded(head_dim)]
    if not fitting:
        raise TargetError(
            f"target {target}", f"a head size of at most {max(tiles)}", str(head_dim), "leave the target out"
        )
    return tiles[min(fitting)]


def _row(target: Target) -> _Row:
    row = _table().get(str(target))
    if row is None:
        known = [name.partition(":")[2] for name in _table() if name.startswith(f"{target.backend}:")]
        raise TargetError(
            f"target {target}",
            f"{target.backend}: with one of {', '.join(known)}",
            target.arch,
            "compile for the nearest lower one",
        )
    return row


@functools.cache
def _table() -> dict[str, _Row]:
    text = importlib.resources.files("surgeon.compiler").joinpath("tiles.json").read_text(encoding="utf-8")
    return {name: _parse(row) for name, row in json.loads(text)["targets"].items()}


def _parse(row: dict[str, Any]) -> _Row:
    prefill, decode = (
        {int(size): Tile(**tile) for size, tile in row[phase].items()} for phase in ("prefill", "decode")
    )
    return _Row(Device(row["warp_size"], row["shared_bytes"]), prefill, decode)
