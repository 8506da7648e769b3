"""KernelSpec ─▶ Source for GPU targets: one Triton module a kernel, with the schedule baked in."""

import math
from dataclasses import dataclass

from surgeon.compiler.decision_tree import head_groups, schedule_trees
from surgeon.compiler.interfaces import PREFILL
from surgeon.compiler.schedule import UNBOUNDED
from surgeon.compiler.stages import KernelSpec, Source, SourceFile
from surgeon.compiler.templates import render_template
from surgeon.compiler.tiles import padded, prefill_tile
from surgeon.runtime.errors import TargetError

MAX_LEAVES = 512
"""The leaves of a kernel's decision trees above which a layer is cut into groups of heads: its compile time grows."""

_MAX_KEY_LIST = 2**31 - 1


@dataclass(frozen=True)
class Tiling:
    """How a kernel's work is cut: tokens a tile of queries and of keys, and the padded head size.

    All sizes are powers of two, `*_shift` their logarithms; a tile lies inside one block.
    """

    query_tile: int
    key_tile: int
    padded_head_dim: int
    block_shift: int
    query_tile_shift: int
    key_tile_shift: int


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
        TargetError: the target is unknown, or no tile of this head size fits it.
    """
    block_size = spec.schedule.block_size
    tile = prefill_tile(spec.target, spec.head_dim, block_size)
    return Tiling(
        query_tile=tile.queries,
        key_tile=tile.keys,
        padded_head_dim=padded(spec.head_dim),
        block_shift=block_size.bit_length() - 1,
        query_tile_shift=tile.queries.bit_length() - 1,
        key_tile_shift=tile.keys.bit_length() - 1,
    )


def render_triton(spec: KernelSpec) -> tuple[Source, ...]:
    """Renders one layer schedule; each file is `<target>/<name>.py` and its function is called `<name>`.

    There is one, named after the spec, or several for consecutive heads where the schedule has many pieces.

    Raises:
        TargetError: the schedule lists more keys than a 32-bit number counts, or no tile fits the target.
    """
    groups = head_groups(spec.schedule, MAX_LEAVES)
    return tuple(_render(spec, heads, whole=len(groups) == 1) for heads in groups)


def _render(spec: KernelSpec, heads: range, whole: bool) -> Source:
    schedule = spec.schedule
    trees = schedule_trees(schedule, heads)
    name = spec.name if whole else f"{spec.name}_head_{heads.start:02d}"
    if trees.num_entries > _MAX_KEY_LIST:
        raise TargetError(
            name,
            f"lists of at most {_MAX_KEY_LIST} keys for {spec.target}",
            str(trees.num_entries),
            "lower the number of distinct cuts in a layer",
        )
    text = render_template(
        "triton/attention.py.jinja",
        name=name,
        layers=_layers_text(spec.layers),
        shape=Shape.of(spec),
        heads=heads,
        tiling=tiling(spec),
        trees=trees,
        num_rows=None if schedule.num_rows == UNBOUNDED else schedule.num_rows,
        arguments=PREFILL.arguments,
        log2_e=repr(math.log2(math.e)),
        ln_2=repr(math.log(2)),
    )
    file = SourceFile(f"{spec.target.folder}/{name}.py", text)
    tile = prefill_tile(spec.target, spec.head_dim, schedule.block_size)
    return Source(spec.target, (spec,), (file,), "prefill", tile, () if whole else (heads.start, heads.stop))


def _layers_text(layers: tuple[int, ...]) -> str:
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{noun} {', '.join(map(str, layers))}"
