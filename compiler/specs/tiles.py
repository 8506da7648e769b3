"""The tiles of GPU kernels on each target: the table tiles.json, or a user's own, read and checked.

Source: tiles.json version 1. Per target: threads per warp, shared memory per program, and for each phase a tile by
padded head size. `surgeon tune` writes the same format.
"""

import dataclasses
import functools
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.compiler.system.powers import padded
from surgeon.runtime.errors import TargetError, short_repr
from surgeon.runtime.package.strict_json import Fault, parse_root, read_document
from surgeon.runtime.package.target import Target

MIN_BLOCK = 16
"""The smallest block that a GPU kernel supports: the fewest terms that a 16-bit matrix instruction sums over."""

MAX_READERS = 32
"""The most triples of a head, a row of blocks in a query tile and a block in a key tile: each is one bit of a mask."""

PHASES = ("prefill", "decode")

HEADS = {"prefill": (1, 2), "decode": (1,)}
"""The numbers of query heads in a program that tables may name; a decoding program has all of a KV head's."""

PERSISTENT = {"prefill": (False, True), "decode": (False,)}
"""The values of `persistent` that tables may name; a decoding kernel has no more programs than run at once anyway."""

LOADS = ("pointers", "descriptors")
"""The ways to read keys and values; the second needs CUDA's compute capability 9.0."""

_FORMAT, _VERSION = "surgeon.tiles", 1
_MAX_FILE_BYTES = 2**20
_LIMITS = {"queries": 256, "keys": 256, "warps": 32, "stages": 16}
_VARIANT = {"loads", "heads", "persistent"}
_HEAD_SIZES = (16, 32, 64, 128, 256)
_REMEDY = "write it as surgeon tune does"
_FAULT = Fault(TargetError, _REMEDY)


@dataclass(frozen=True)
class Device:
    """A target's resources: threads per warp, and bytes of shared memory that one program may use."""

    warp_size: int
    shared_bytes: int


@dataclass(frozen=True)
class Tile:
    """A kernel's variant and its numbers: a tile's queries and keys in tokens, its warps, and the key tiles in flight.

    `loads` is the way in which prefill kernels read keys and values: through "pointers", or through tensor
    "descriptors" that a program makes, for a Hopper's copy engine. `heads` is the number of query heads of a KV head
    whose queries a prefill program handles, `queries` of each: it reads their keys and values once. `persistent`
    programs are as many as the device runs at once, and take tiles of queries until none is left; otherwise there is a
    program for each.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    loads: str = LOADS[0]
    heads: int = 1
    persistent: bool = False

    @property
    def variant(self) -> tuple[str, ...]:
        """The parts of the variant that are not the default, in words."""
        loads = () if self.loads == LOADS[0] else (f"loads by {self.loads}",)
        heads = () if self.heads == 1 else (f"{self.heads} heads",)
        return (*loads, *heads, "persistent programs") if self.persistent else loads + heads

    @property
    def rows(self) -> int:
        """The queries of all heads of a program."""
        return self.queries * self.heads


@dataclass(frozen=True)
class TargetTiles:
    """One target's tiles, per phase by padded head size: a head of another size takes the next larger one."""

    target: Target
    device: Device
    prefill: Mapping[int, Tile]
    decode: Mapping[int, Tile]

    def prefill_tile(self, head_dim: int, block_size: int, heads_per_kv_head: int = 1) -> Tile:
        """The tile of a kernel for many queries: within one block, or over several whole blocks if they are smaller.

        If the heads of a program do not divide a KV head's, it has more queries of one.

        Raises:
            TargetError: no tile for this head size or block size fits the target.
        """
        tile = self.listed("prefill", head_dim)
        if block_size < MIN_BLOCK:
            raise TargetError(
                "block_size",
                f"at least {MIN_BLOCK} tokens for {self.target}, the fewest its matrix instructions take",
                str(block_size),
                "learn the topology with blocks of 32, 64 or 128",
            )
        heads = tile.heads if heads_per_kv_head % tile.heads == 0 else 1
        queries, warps = tile.rows // heads, tile.warps
        keys = min(tile.keys, queries)  # the keys before a tile of queries are whole tiles
        while max(1, queries // block_size) * max(1, keys // block_size) * heads > MAX_READERS:
            queries, warps = queries // 2, max(1, warps // 2)
            keys = min(keys, queries)
        return dataclasses.replace(tile, queries=queries, keys=keys, warps=warps, heads=heads)

    def paged_prefill_tile(self, head_dim: int, block_size: int, heads_per_kv_head: int = 1) -> Tile:
        """The tile of a prefill kernel for keys in pages of one or several blocks: its keys lie within a block.

        Raises:
            TargetError: no tile for this head size or block size fits the target.
        """
        tile = self.prefill_tile(head_dim, block_size, heads_per_kv_head)
        tile = dataclasses.replace(tile, keys=min(tile.keys, block_size), loads=LOADS[0], persistent=False)
        return self.for_pages(tile)

    def decode_tile(self, head_dim: int, block_size: int, heads_per_kv_head: int) -> Tile:
        """The tile of a kernel for one query per sequence: its rows are the query heads of a KV head.

        Raises:
            TargetError: no tile for this head size fits the target.
        """
        tile = self.listed("decode", head_dim)
        rows, keys = max(tile.queries, padded(heads_per_kv_head)), min(tile.keys, block_size)
        return dataclasses.replace(tile, queries=rows, keys=keys)

    def for_pages(self, tile: Tile) -> Tile:
        """The tile with as many tiles of keys in flight where each first needs an entry of a block table.

        For CUDA, Triton divides the stages between the load of the entry and that of the keys; with 2n - 1 of them the
        keys have the shared memory that n give without a table.
        """
        if self.target.backend != "cuda":
            return tile
        return dataclasses.replace(tile, stages=2 * tile.stages - 1)

    def listed(self, phase: str, head_dim: int) -> Tile:
        """The table's tile for a head size, whatever the block size.

        Raises:
            TargetError: there is none.
        """
        tiles = self._of(phase)
        fitting = [size for size in tiles if size >= padded(head_dim)]
        if not fitting:
            raise TargetError(
                f"target {self.target}", f"a head size of at most {max(tiles)}", str(head_dim), "leave the target out"
            )
        return tiles[min(fitting)]

    def with_tile(self, phase: str, head_dim: int, tile: Tile) -> "TargetTiles":
        """A copy with another tile for a head size."""
        tiles = dict(sorted((dict(self._of(phase)) | {padded(head_dim): tile}).items()))
        prefill, decode = (tiles if name == phase else self._of(name) for name in PHASES)
        return dataclasses.replace(self, prefill=prefill, decode=decode)

    def _of(self, phase: str) -> Mapping[int, Tile]:
        return {"prefill": self.prefill, "decode": self.decode}[phase]


def loads_of(target: Target, phase: str) -> tuple[str, ...]:
    """The ways in which a phase's kernels can read keys and values on a target."""
    has_copy_engine = target.backend == "cuda" and int(target.arch) >= 90
    return LOADS if has_copy_engine and phase == "prefill" else LOADS[:1]


def tiles_of(target: Target, own: Mapping[Target, TargetTiles] | None = None) -> TargetTiles:
    """A target's tiles: those of the user's own table if it has the target, else the built-in ones.

    Raises:
        TargetError: neither table has it.
    """
    found = (own or {}).get(target) or _built_in().get(target)
    if found is None:
        known = [known.arch for known in _built_in() if known.backend == target.backend]
        raise TargetError(
            f"target {target}",
            f"{target.backend}: with one of {', '.join(known)}",
            target.arch,
            "compile for the nearest lower one",
        )
    return found


def read_tiles(path: str | os.PathLike[str]) -> dict[Target, TargetTiles]:
    """Reads a tile table.

    Raises:
        TargetError: the file is missing, not JSON, or holds tiles that no kernel could use; the text says where.
    """
    return read_document(path, _MAX_FILE_BYTES, parse_tiles, _FAULT)


def parse_tiles(text: str) -> dict[Target, TargetTiles]:
    """Parses the text of a tile table.

    Raises:
        TargetError: it is not JSON, or holds tiles that no kernel could use.
    """
    _, plain = parse_root(text, _FORMAT, (_VERSION,), "tiles", _FAULT)
    root = _object(plain, "tiles", {"source", "targets"})
    rows = root["targets"]
    if not isinstance(rows, dict) or not rows:
        raise TargetError("tiles.targets", "an object with a target", short_repr(rows), _REMEDY)
    return {Target.parse(name): _parse(Target.parse(name), row, f"targets.{name}") for name, row in rows.items()}


def tiles_json(rows: Mapping[Target, TargetTiles], source: str) -> str:
    """Formats a tile table; `source` says where its numbers come from."""
    targets = []
    for target, row in rows.items():
        phases = (
            f'"{phase}": {{\n'
            + ",\n".join(f'   "{size}": {json.dumps(_plain(tile))}' for size, tile in tiles.items())
            + "\n  }"
            for phase, tiles in (("prefill", row.prefill), ("decode", row.decode))
        )
        device = json.dumps(dataclasses.asdict(row.device))[1:-1]
        targets.append(f'  "{target}": {{{device}, {", ".join(phases)}}}')
    root = {"format": _FORMAT, "version": _VERSION, "source": source}
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in root.items())
    return "{\n" + head + ' "targets": {\n' + ",\n".join(targets) + "\n }\n}\n"


def _plain(tile: Tile) -> dict[str, object]:
    """A tile's fields, without a variant's that are the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(tile)}
    return {name: value for name, value in dataclasses.asdict(tile).items() if value != defaults[name]}


@functools.cache
def _built_in() -> dict[Target, TargetTiles]:
    return parse_tiles(
        importlib.resources.files("surgeon.compiler.specs").joinpath("tiles.json").read_text(encoding="utf-8")
    )


def _parse(target: Target, row: object, where: str) -> TargetTiles:
    fields = _object(row, where, {"warp_size", "shared_bytes", *PHASES})
    device = Device(
        _number(fields["warp_size"], f"{where}.warp_size", 64),
        _number(fields["shared_bytes"], f"{where}.shared_bytes", 2**20),
    )
    if device.warp_size not in (32, 64):
        raise TargetError(f"{where}.warp_size", "32 or 64", str(device.warp_size), _REMEDY)
    prefill, decode = (_tiles(fields[phase], f"{where}.{phase}") for phase in PHASES)
    for phase, tiles in zip(PHASES, (prefill, decode), strict=True):
        for size, tile in tiles.items():
            _check_variant(tile.loads, loads_of(target, phase), f"{where}.{phase}.{size}.loads")
            _check_variant(tile.heads, HEADS[phase], f"{where}.{phase}.{size}.heads")
            _check_variant(tile.persistent, PERSISTENT[phase], f"{where}.{phase}.{size}.persistent")
    return TargetTiles(target, device, prefill, decode)


def _check_variant(value: object, allowed: Sequence[object], where: str) -> None:
    """Refuses a part of a variant; a number is not a truth value."""
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise TargetError(where, " or ".join(str(each).lower() for each in allowed), short_repr(value), _REMEDY)


def _tiles(rows: object, where: str) -> dict[int, Tile]:
    names = {str(size): size for size in _HEAD_SIZES}
    if not isinstance(rows, dict) or not rows or not set(rows) <= set(names):
        raise TargetError(where, f"tiles by head size, any of {', '.join(names)}", short_repr(rows), _REMEDY)
    return {names[size]: _tile(rows[size], f"{where}.{size}") for size in names if size in rows}


def _tile(fields: object, where: str) -> Tile:
    variant = _VARIANT & set(fields) if isinstance(fields, dict) else set()
    tile = _object(fields, where, set(_LIMITS) | variant)
    for name, limit in _LIMITS.items():
        number = _number(tile[name], f"{where}.{name}", limit)
        if name != "stages" and number & (number - 1):
            raise TargetError(f"{where}.{name}", "a power of two", str(number), _REMEDY)
    for name in ("queries", "keys"):
        if tile[name] < MIN_BLOCK:
            raise TargetError(f"{where}.{name}", f"at least {MIN_BLOCK} tokens", str(tile[name]), _REMEDY)
    return Tile(**tile)


def _object(value: object, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise TargetError(where, "an object of " + ", ".join(sorted(keys)), short_repr(value), _REMEDY)
    return value


def _number(value: object, where: str, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise TargetError(where, f"a whole number in 1..{limit}", short_repr(value), _REMEDY)
    return value
