"""The packages of a day, compiled beforehand on a machine without a GPU, so that none of its minutes goes to that."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_day.day import Day
from gpu_day.smoke import PACKAGE as SMOKE
from gpu_day.smoke import STAGES as SMOKE_STAGES
from inputs.topologies import Shape
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.specs.tiles import TargetTiles, Tile, tiles_of
from surgeon.compiler.tune.candidates import decode_candidates, prefill_candidates
from surgeon.runtime.package.target import Target

MAX_BYTES = 40 * 2**20
"""The most that all packages may take: a source tree of 64 MiB travels with them."""


@dataclass(frozen=True)
class Prepared:
    """A package to compile: its folder's name, and the tiles that it is compiled with, None for the built-in ones."""

    name: str
    topology: Topology
    tiles: TargetTiles | None = None


def prepared(day: Day) -> Iterator[Prepared]:
    """Lists the packages of a day: of the smoke call, of the candidate tiles, of the speed, and of the model."""
    yield Prepared(SMOKE, day.topology(day.shape, 8 * day.shape.block_size, 0.5))
    for shape in day.shapes:
        topology = day.topology(shape, day.tuned_length, day.densities[0])
        for index, (prefill, decode) in enumerate(candidates(day, shape)):
            tiles = None
            if prefill and decode:
                tiles = tiles_of(Target.parse(day.target)).with_tile("prefill", shape.head_dim, prefill)
                tiles = tiles.with_tile("decode", shape.head_dim, decode)
            yield Prepared(candidate_name(shape, index), topology, tiles)
    for length in day.lengths:
        for density in day.densities:
            topology = day.topology(day.shape, length, density)
            yield Prepared(day.named(day.shape, length, density), topology)
    yield Prepared("model", day.topology(day.shape, day.model_length, day.densities[0], day.model_layers))


def candidates(day: Day, shape: Shape) -> tuple[tuple[Tile | None, Tile | None], ...]:
    """Pairs of tiles to try, for many queries and for one, the first pair the built-in ones. A CPU has none.

    Those for many queries are the day's own, if their heads divide a KV head's; the rest are spread evenly over the
    grids of `surgeon tune`.
    """
    if day.target == "cpu":
        return ((None, None),) * day.candidates
    tiles = tiles_of(Target.parse(day.target))
    group = shape.heads // shape.kv_heads
    grids = prefill_candidates(tiles, shape.head_dim, group), decode_candidates(tiles, shape.head_dim)
    prefill, decode = ([grid[index * len(grid) // day.candidates] for index in range(day.candidates)] for grid in grids)
    own = [tile for tile in day.prefill_tiles if group % tile.heads == 0]
    prefill = list(dict.fromkeys((prefill[0], *own, *prefill)))[: day.candidates]
    return tuple(zip(prefill, decode, strict=True))


def candidate_name(shape: Shape, index: int) -> str:
    """The folder of a candidate's package."""
    return f"tiles-{shape.head_dim}-{index}"


def prepare(day: Day, folder: Path) -> int:
    """Compiles all packages of a day into a folder and returns their size in bytes.

    Beside the package of the smoke call lies what every stage of its compilation made, the assembly of its kernels too.
    """
    for each in prepared(day):
        own = {each.tiles.target: each.tiles} if each.tiles else None
        dump = folder / SMOKE_STAGES if each.name == SMOKE else None
        compile_package(each.topology, folder / each.name, [day.target], [day.dtype], dump=dump, tiles=own)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
