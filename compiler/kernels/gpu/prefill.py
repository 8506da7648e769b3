"""KernelSpecs ─▶ Sources of the prefill kernels of a GPU target: Triton modules with the schedules baked in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.compiler.kernels.gpu import decision_tree, segment_trees
from surgeon.compiler.kernels.gpu.decision_tree import ScheduleTrees, head_groups
from surgeon.compiler.kernels.gpu.segment_trees import SegmentTrees
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape, prefill_table
from surgeon.compiler.specs.artifacts import KernelSpec, Source, SourceFile
from surgeon.compiler.specs.tiles import padded
from surgeon.compiler.system.jinja import render_template
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.interface import INTERFACES
from surgeon.runtime.package.schedule import UNBOUNDED

MAX_LEAVES = 512
"""The leaves of a kernel's decision trees above which a layer is cut into groups of heads: its compile time grows."""

MAX_KERNELS = 4
"""The kernels for groups of heads above which a layer's schedule is a table instead."""

_MAX_KEY_LIST = 2**31 - 1


@dataclass(frozen=True)
class Tiling:
    """How a kernel's work is cut: tokens a tile of queries and of keys, and the padded head size.

    A tile of queries lies in one row of blocks or is `rows` of them, whose tokens `rows_shift` counts. A tile of keys
    lies in one block or is `blocks` of them, whose tokens `unit_shift` counts. All sizes are powers of two, `*_shift`
    their logarithms.
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


@dataclass(frozen=True)
class Shape:
    """What a template must know of the model."""

    num_heads: int
    num_key_value_heads: int
    heads_per_kv_head: int
    head_dim: int
    block_size: int

    @classmethod
    def of(cls, spec: KernelSpec) -> "Shape":
        """The shape of a kernel's layers."""
        schedule = spec.schedule
        num_heads, kv_heads = len(schedule.heads), schedule.num_key_value_heads
        return cls(num_heads, kv_heads, num_heads // kv_heads, spec.head_dim, schedule.block_size)


def tiling(spec: KernelSpec) -> Tiling:
    """The tiles of a kernel, which follow from its block size, head size and target.

    Raises:
        TargetError: no tile of this head size or these blocks fits it.
    """
    block_size = spec.schedule.block_size
    tile = spec.gpu_tiles.prefill_tile(spec.head_dim, block_size)
    rows, blocks = max(1, tile.queries // block_size), max(1, tile.keys // block_size)
    return Tiling(
        query_tile=tile.queries,
        key_tile=tile.keys,
        padded_head_dim=padded(spec.head_dim),
        block_shift=_log2(block_size),
        query_tile_shift=_log2(tile.queries),
        key_tile_shift=_log2(tile.keys),
        rows=rows,
        blocks=blocks,
        rows_shift=_log2(rows * block_size),
        unit_shift=_log2(blocks * block_size),
    )


def render_triton(specs: Sequence[KernelSpec]) -> tuple[Source, ...]:
    """Renders one target's layer schedules; each file is `<target>/<name>.py` and its function is called `<name>`.

    A schedule is code in a kernel named after its spec, or in several for consecutive heads where it has many pieces.
    Where it has too many for that it is a table, and one kernel, `attention_by_table`, serves all such layers.

    Raises:
        TargetError: the schedule lists more keys than a 32-bit number counts, or no tile fits the target.
    """
    cut = tiling(specs[0])
    sources: list[Source] = []
    by_table: list[KernelSpec] = []
    for spec in specs:
        leaves = _leaves(spec.schedule, cut)
        groups = head_groups(spec.schedule, leaves, MAX_LEAVES)
        if max(leaves) > MAX_LEAVES or len(groups) > MAX_KERNELS:
            by_table.append(spec)
        else:
            sources += (_by_code(spec, cut, heads) for heads in groups)
    return (*sources, _by_table(by_table, cut)) if by_table else tuple(sources)


def _leaves(schedule: LayerSchedule, cut: Tiling) -> list[int]:
    """About how many leaves each head's own part of the decision trees has."""
    if cut.rows == 1:
        return [decision_tree.num_leaves(head) for head in schedule.heads]
    table = prefill_table(schedule, cut.rows, cut.blocks)
    return [segment_trees.num_leaves(table, head) for head in range(len(schedule.heads))]


def _by_code(spec: KernelSpec, cut: Tiling, heads: range) -> Source:
    """The kernel of some heads of a layer, with their schedule as decision trees."""
    schedule = spec.schedule
    name = spec.name if len(heads) == len(schedule.heads) else f"{spec.name}_head_{heads.start:02d}"
    if cut.rows > 1:
        trees = segment_trees.segment_trees(prefill_table(schedule, cut.rows, cut.blocks), heads)
        return _source((spec,), cut, name, heads, trees, table=None)
    keys = decision_tree.schedule_trees(schedule, heads)
    if keys.num_entries > _MAX_KEY_LIST:
        raise TargetError(
            name,
            f"lists of at most {_MAX_KEY_LIST} keys for {spec.target}",
            str(keys.num_entries),
            "lower the number of distinct cuts in a layer",
        )
    return _source((spec,), cut, name, heads, keys, table=None)


def _by_table(specs: Sequence[KernelSpec], cut: Tiling) -> Source:
    """The kernel of all layers whose schedules are tables."""
    heads = range(len(specs[0].schedule.heads))
    return _source(specs, cut, "attention_by_table", heads, None, TableShape("prefill", cut.rows, cut.blocks))


def _source(
    specs: Sequence[KernelSpec],
    cut: Tiling,
    name: str,
    heads: range,
    trees: ScheduleTrees | SegmentTrees | None,
    table: TableShape | None,
) -> Source:
    spec, shape = specs[0], Shape.of(specs[0])
    num_rows = spec.schedule.num_rows
    whole = len(heads) == shape.num_heads
    template = "prefill_rows" if isinstance(trees, ScheduleTrees) else "prefill_segments"
    text = render_template(
        f"gpu/{template}.py.jinja",
        name=name,
        layers=_layers_text(sorted(layer for spec in specs for layer in spec.layers)),
        shape=shape,
        heads=heads,
        tiling=cut,
        trees=trees,
        max_segments=padded(max(table.of(spec.schedule).max_segments for spec in specs)) if table else None,
        num_rows=None if num_rows == UNBOUNDED else num_rows,
        arguments=INTERFACES["prefill", table is not None].arguments,
        log2_e=repr(math.log2(math.e)),
        ln_2=repr(math.log(2)),
    )
    return Source(
        target=spec.target,
        specs=tuple(specs),
        files=(SourceFile(f"{spec.target.folder}/{name}.py", text),),
        phase="prefill",
        tile=spec.gpu_tiles.prefill_tile(spec.head_dim, shape.block_size),
        heads=() if whole else (heads.start, heads.stop),
        table=table,
    )


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _layers_text(layers: Sequence[int]) -> str:
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{noun} {', '.join(map(str, layers))}"
