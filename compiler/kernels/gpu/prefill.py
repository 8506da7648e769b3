"""KernelSpecs ─▶ Sources of a GPU target's prefill kernels: Triton modules with the schedules built in."""

import math
from collections.abc import Mapping, Sequence

from surgeon.compiler.kernels.gpu import row_trees, segment_trees
from surgeon.compiler.kernels.gpu.row_trees import ScheduleTrees
from surgeon.compiler.kernels.gpu.segment_trees import SegmentTrees
from surgeon.compiler.kernels.gpu.tiling import Tiling, tiling_of
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.artifacts import GpuSource, SourceFile
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.system.jinja import render_template
from surgeon.compiler.system.powers import padded
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.interface import interfaces_of
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule
from surgeon.runtime.package.segment_table import SegmentTable

MAX_LEAVES = 512
"""The most leaves in one kernel's decision trees: with more, a layer is split by heads, as compile time grows."""

MAX_KERNELS = 4
"""The most kernels per layer, one per group of heads: with more, the layer's schedule is a table instead."""

_MAX_KEY_LIST = 2**31 - 1


def wanted_tables(specs: Sequence[GpuSpec]) -> dict[str, tuple[LayerSchedule, TableShape]]:
    """The tables that prefill kernels are rendered from, by the names that they would have in the package.

    If a tile of queries spans several rows, all kernels are; if not, only those whose schedule is too large to be code.
    """
    cut = tiling_of(specs[0])
    shape = _table_shape(cut)
    wanted = specs if cut.masks_blocks else [spec for spec in specs if _is_too_much(spec, cut, _row_leaves(spec))]
    return {f"{spec.name}.{shape.name}": (spec.schedule, shape) for spec in wanted}


def render_prefill(
    specs: Sequence[GpuSpec], tables: Mapping[str, SegmentTable], paged: bool = False
) -> tuple[GpuSource, ...]:
    """Renders one target's layer schedules; each file is `<target>/<name>.py` and its function is called `<name>`.

    A schedule is code in a kernel named after its spec, or, if it has many pieces, in several for consecutive heads.
    If it has too many pieces for that, it is a table, and one kernel, `attention_by_table`, serves all such layers, or
    `routed_attention_by_table` those with routed heads. The names of `paged` kernels begin with `paged_`.
    `tables` are those of `wanted_tables`.

    Raises:
        TargetError: the schedule lists more keys than a 32-bit number counts.
    """
    cut = tiling_of(specs[0])
    shape = _table_shape(cut)
    sources: list[GpuSource] = []
    by_table: dict[str, tuple[GpuSpec, SegmentTable]] = {}
    for spec in specs:
        name = f"{spec.name}.{shape.name}"
        table = tables.get(name)
        leaves = _table_leaves(tables[name]) if cut.masks_blocks else _row_leaves(spec)
        if table is not None and _is_too_much(spec, cut, leaves):
            by_table[name] = spec, table
            continue
        for heads in _kernel_heads(spec, cut, leaves):
            sources.append(_by_code(spec, cut, heads, table, paged))
    for routed in (False, True):
        kind = {name: found for name, found in by_table.items() if found[0].is_routed == routed}
        if kind:
            sources.append(_by_table(kind, cut, shape, paged))
    return tuple(sources)


def _table_shape(cut: Tiling) -> TableShape:
    return TableShape("prefill", cut.rows, cut.blocks, cut.heads)


def _is_too_much(spec: GpuSpec, cut: Tiling, leaves: Sequence[int]) -> bool:
    """True if a schedule has too many leaves to be code, in one pattern or in all of them together."""
    if cut.heads > 1:  # one kernel has all heads, since groups of them would have to be split
        return sum(leaves) > MAX_LEAVES
    return max(leaves) > MAX_LEAVES or len(_kernel_heads(spec, cut, leaves)) > MAX_KERNELS


def _kernel_heads(spec: GpuSpec, cut: Tiling, leaves: Sequence[int]) -> tuple[range, ...]:
    """The heads of each kernel that has a schedule as code."""
    if cut.heads > 1:
        return (range(len(spec.schedule.heads)),)
    return head_groups(spec.schedule, leaves, MAX_LEAVES)


def _row_leaves(spec: GpuSpec) -> list[int]:
    """The approximate number of leaves in each head's own part of the decision trees."""
    return [row_trees.num_leaves(head) for head in spec.schedule.heads]


def _table_leaves(table: SegmentTable) -> list[int]:
    return [segment_trees.num_leaves(table, pattern) for pattern in range(len(table.rows))]


def _by_code(spec: GpuSpec, cut: Tiling, heads: range, table: SegmentTable | None, paged: bool) -> GpuSource:
    """Renders the kernel for some heads of a layer, with their schedule as decision trees."""
    schedule = spec.schedule
    name = spec.name if len(heads) == len(schedule.heads) else f"{spec.name}_head_{heads.start:02d}"
    if table is not None:
        patterns = heads if cut.heads == 1 else range(len(table.rows))
        return _source((spec,), cut, name, heads, segment_trees.segment_trees(table, patterns), paged)
    keys = row_trees.schedule_trees(schedule, heads)
    if keys.num_entries > _MAX_KEY_LIST:
        raise TargetError(
            name,
            f"lists of at most {_MAX_KEY_LIST} keys for {spec.target}",
            str(keys.num_entries),
            "lower the number of distinct cuts in a layer",
        )
    return _source((spec,), cut, name, heads, keys, paged)


def _by_table(
    found: Mapping[str, tuple[GpuSpec, SegmentTable]], cut: Tiling, shape: TableShape, paged: bool
) -> GpuSource:
    """Renders the kernel for all layers whose schedules are tables."""
    specs = [spec for spec, _ in found.values()]
    heads = range(len(specs[0].schedule.heads))
    tables = {name: table for name, (_, table) in found.items()}
    name = "routed_attention_by_table" if specs[0].is_routed else "attention_by_table"
    return _source(specs, cut, name, heads, None, paged, shape.name, tables)


def head_groups(layer: LayerSchedule, leaves: Sequence[int], max_leaves: int) -> tuple[range, ...]:
    """Splits a layer's heads into consecutive groups whose trees have at most about `max_leaves` leaves, or one head.

    `leaves` holds the leaves of each head; equal heads in a group count once.
    """
    begins, total = [0], 0
    patterns: set[HeadSchedule] = set()
    for index, (head, own) in enumerate(zip(layer.heads, leaves, strict=True)):
        more = 0 if head in patterns else own
        if more and total and total + more > max_leaves:
            begins.append(index)
            total, patterns = 0, set()
        total += more
        patterns.add(head)
    return tuple(range(begin, end) for begin, end in zip(begins, [*begins[1:], len(layer.heads)], strict=True))


def _source(
    specs: Sequence[GpuSpec],
    cut: Tiling,
    name: str,
    heads: range,
    trees: ScheduleTrees | SegmentTrees | None,
    paged: bool,
    table: str = "",
    tables: Mapping[str, SegmentTable] | None = None,
) -> GpuSource:
    spec, shape = specs[0], specs[0].shape
    num_rows = spec.schedule.num_rows
    whole = len(heads) == shape.num_heads
    phase, name = ("paged_prefill", f"paged_{name}") if paged else ("prefill", name)
    interface = interfaces_of(spec.is_routed)[phase, bool(table)]
    template = "prefill_rows" if isinstance(trees, ScheduleTrees) else "prefill_segments"
    text = render_template(
        f"gpu/{template}.py.jinja",
        name=name,
        layers=_layers_text(sorted(layer for spec in specs for layer in spec.layers)),
        shape=shape,
        heads=heads,
        tiling=cut,
        loads=spec.prefill.loads,
        persistent=spec.prefill.persistent,
        paged=paged,
        least_queries=1 if spec.decode is None else 2,
        trees=trees,
        max_segments=padded(max(read.max_segments for read in tables.values())) if tables else None,
        num_rows=None if num_rows == UNBOUNDED else num_rows,
        routed=spec.is_routed,
        arguments=(interface.persistent if spec.prefill.persistent else interface).arguments,
        log2_e=repr(math.log2(math.e)),
        ln_2=repr(math.log(2)),
    )
    return GpuSource(
        target=spec.target,
        specs=tuple(specs),
        files=(SourceFile(f"{spec.target.folder}/{name}.py", text),),
        phase=phase,
        tile=spec.prefill,
        heads=() if whole else (heads.start, heads.stop),
        table=table,
        tables=tables or {},
    )


def _layers_text(layers: Sequence[int]) -> str:
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{noun} {', '.join(map(str, layers))}"
