"""KernelSpecs ─▶ Sources of the two decoding kernels of a GPU target, which all of its layers share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.compiler.kernels.gpu.prefill import Shape
from surgeon.compiler.schedule.segment_tables import MAX_GROUP, TableShape
from surgeon.compiler.specs.artifacts import KernelSpec, Source, SourceFile
from surgeon.compiler.specs.tiles import Tile, padded
from surgeon.compiler.system.jinja import render_template
from surgeon.runtime.package.interface import DECODE, REDUCE
from surgeon.runtime.package.schedule import UNBOUNDED

_SPLITS_AT_ONCE = 16
_TABLE = TableShape("decode")


@dataclass(frozen=True)
class DecodeTile:
    """How a decoding kernel's work is cut; sizes are powers of two, `*_shift` the logarithms of tokens.

    `rows` are a KV head's query heads, padded; `segments` is at least the longest plan of any table.
    """

    rows: int
    keys: int
    padded_head_dim: int
    key_shift: int
    block_shift: int
    segments: int


@dataclass(frozen=True)
class ReduceTile:
    """How many splits are joined at once, and the padded head size."""

    splits: int
    padded_head_dim: int


def render_decode(specs: Sequence[KernelSpec]) -> tuple[Source, ...]:
    """Renders `decode.py` and `reduce.py` for one target; nothing where a KV head has too many query heads for a table.

    Without them a single query runs on the kernel for many.

    Raises:
        TargetError: no tile fits the target.
    """
    first = specs[0]
    shape = Shape.of(first)
    if shape.heads_per_kv_head > MAX_GROUP:
        return ()
    tile = first.gpu_tiles.decode_tile(first.head_dim, shape.block_size, shape.heads_per_kv_head)
    num_rows = first.schedule.num_rows
    decode = render_template(
        "gpu/decode.py.jinja",
        shape=shape,
        tile=DecodeTile(
            rows=tile.queries,
            keys=tile.keys,
            padded_head_dim=padded(first.head_dim),
            key_shift=tile.keys.bit_length() - 1,
            block_shift=shape.block_size.bit_length() - 1,
            segments=padded(max(_TABLE.of(spec.schedule).max_segments for spec in specs)),
        ),
        num_rows=None if num_rows == UNBOUNDED else num_rows,
        arguments=DECODE.arguments,
        log2_e=repr(math.log2(math.e)),
    )
    reduce = render_template(
        "gpu/combine.py.jinja",
        shape=shape,
        tile=ReduceTile(_SPLITS_AT_ONCE, padded(first.head_dim)),
        arguments=REDUCE.arguments,
        ln_2=repr(math.log(2)),
    )
    return (
        _source("decode", specs, decode, tile, _TABLE),
        _source("reduce", specs, reduce, Tile(queries=1, keys=1, warps=4, stages=1), None),
    )


def _source(phase: str, specs: Sequence[KernelSpec], text: str, tile: Tile, table: TableShape | None) -> Source:
    target = specs[0].target
    file = SourceFile(f"{target.folder}/{phase}.py", text)
    return Source(target, tuple(specs), (file,), phase, tile, table=table)
