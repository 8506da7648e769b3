"""KernelSpecs ─▶ Sources of a GPU target's two decoding kernels, which all of its layers share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.artifacts import GpuSource, SourceFile
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.system.jinja import render_template
from surgeon.compiler.system.powers import log2, padded
from surgeon.runtime.package.interface import COMBINE, PAGED_COMBINE, interfaces_of
from surgeon.runtime.package.schedule import UNBOUNDED
from surgeon.runtime.package.segment_table import SegmentTable

_SPLITS_AT_ONCE = 16
TABLE = TableShape("decode")
"""The kind of table that decoding kernels read."""


@dataclass(frozen=True)
class DecodeTile:
    """The tiling of a decoding kernel; sizes are powers of two, `*_shift` their logarithms, in tokens.

    `rows` is the number of query heads per KV head, padded; `segments` is at least the longest plan of any table.
    """

    rows: int
    keys: int
    padded_head_dim: int
    key_shift: int
    block_shift: int
    segments: int


@dataclass(frozen=True)
class CombineTile:
    """The number of splits combined at once, and the padded head size."""

    splits: int
    padded_head_dim: int


def wanted_tables(specs: Sequence[GpuSpec]) -> dict[str, tuple[LayerSchedule, TableShape]]:
    """The tables that the decoding kernel reads, by their names in the package; empty if there is no such kernel."""
    return {f"{spec.name}.{TABLE.name}": (spec.schedule, TABLE) for spec in specs if spec.decode is not None}


def render_decode(
    specs: Sequence[GpuSpec], tables: Mapping[str, SegmentTable], paged: bool = False
) -> tuple[GpuSource, ...]:
    """Renders `decode.py` and `combine.py` for one target, or nothing if a KV head has too many query heads.

    Layers with routed heads have `routed_decode.py` instead of `decode.py`; `paged` kernels are `paged_decode.py` and
    `paged_combine.py`. `tables` are those of `wanted_tables`.
    """
    first = specs[0]
    if first.decode is None:
        return ()
    name = "paged_combine" if paged else "combine"
    combine = render_template(
        "gpu/combine.py.jinja",
        name=name,
        paged=paged,
        shape=first.shape,
        tile=CombineTile(_SPLITS_AT_ONCE, padded(first.head_dim)),
        arguments=(PAGED_COMBINE if paged else COMBINE).arguments,
        ln_2=repr(math.log(2)),
    )
    kinds = [tuple(spec for spec in specs if spec.is_routed == routed) for routed in (False, True)]
    return (
        *(_decode(kind, first.decode, tables, paged) for kind in kinds if kind),
        GpuSource(
            first.target,
            tuple(specs),
            _files(name, first.target.folder, combine),
            name,
            Tile(1, 1, warps=4, stages=1),
        ),
    )


def _decode(specs: tuple[GpuSpec, ...], tile: Tile, tables: Mapping[str, SegmentTable], paged: bool) -> GpuSource:
    """Renders the kernel for layers that all have routed heads or all have none."""
    first = specs[0]
    shape, num_rows = first.shape, first.schedule.num_rows
    phase = "paged_decode" if paged else "decode"
    name = "routed_decode" if first.is_routed else phase
    read = {name: tables[name] for name in wanted_tables(specs)}
    text = render_template(
        "gpu/decode.py.jinja",
        name=name,
        routed=first.is_routed,
        paged=paged,
        shape=shape,
        tile=DecodeTile(
            rows=tile.queries,
            keys=tile.keys,
            padded_head_dim=padded(first.head_dim),
            key_shift=log2(tile.keys),
            block_shift=log2(shape.block_size),
            segments=padded(max(table.max_segments for table in read.values())),
        ),
        num_rows=None if num_rows == UNBOUNDED else num_rows,
        arguments=interfaces_of(first.is_routed)[phase, True].arguments,
        log2_e=repr(math.log2(math.e)),
    )
    files = _files(name, first.target.folder, text)
    return GpuSource(first.target, specs, files, phase, tile, (), TABLE.name, read)


def _files(name: str, folder: str, text: str) -> tuple[SourceFile, ...]:
    return (SourceFile(f"{folder}/{name}.py", text),)
