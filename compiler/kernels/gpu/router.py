"""KernelSpecs ─▶ Sources of a GPU target's kernels for routed heads, which all routed layers share.

Three kernels run before those that read the schedule: one writes the nodes of the keys, one chooses blocks by them, and
one attends over the chosen blocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgeon.compiler.kernels.gpu import decode
from surgeon.compiler.specs.artifacts import GpuSource, SourceFile
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.system.jinja import render_template
from surgeon.compiler.system.powers import log2, padded
from surgeon.runtime.package.interface import ATTEND_CHOSEN, CHOOSE, WRITE_NODES
from surgeon.runtime.package.schedule import MOST_SINGLES, NODE, TILE, UNBOUNDED
from surgeon.runtime.package.segment_table import SegmentTable

_STEPS = 127.0  # quantised numbers are -_STEPS to _STEPS
_TO_WHOLE = 1.5 * 2**23  # a float32 of this size has no bits behind the point
_LAST_BLOCK = 2**31 - 1
_NOTHING = -(2**62)
_NODE_CHANNELS = 2048  # of the nodes that a program writes: with more, its keys do not fit into registers
_CHANNELS_A_WARP = 32  # of the sums of attention over chosen blocks: with more, they do not fit into registers
_SLOTS = 16  # the fewest rows of a matrix instruction
_CHOOSE = Tile(_SLOTS, 1, warps=8, stages=1)


@dataclass(frozen=True)
class RouterTile:
    """The tiling of the kernels for routed heads, as numbers ready to print; `*_shift` are logarithms.

    A program of `write_nodes` has `nodes` nodes of `node` keys each; one of `choose` has `slots` units of up to
    `queries` queries, and scores `chunk` blocks at once; one of `attend_chosen` reads `keys` keys at once.
    """

    node: int
    node_shift: int
    half_node: int
    nodes: int
    node_keys: int
    padded_group: int
    padded_head_dim: int
    block_shift: int
    nodes_per_block: int
    queries: int
    query_shift: int
    most_singles: int
    slots: int
    chunk: int
    keys: int
    key_shift: int
    tiles_per_block: int
    tile_to_block_shift: int


def render_router(specs: Sequence[GpuSpec], tables: Mapping[str, SegmentTable]) -> tuple[GpuSource, ...]:
    """Renders `write_nodes.py`, `choose.py` and `attend_chosen.py` for one target, or nothing if no head is routed.

    `tables` are those of `decode.wanted_tables`, which tell what the schedule leaves to choose from.
    """
    routed = tuple(spec for spec in specs if spec.is_routed)
    if not routed:
        return ()
    first = routed[0]
    assert first.decode is not None  # specialize refuses others
    warps = max(first.decode.warps, padded(first.head_dim) // _CHANNELS_A_WARP)
    attended = replace(first.decode, queries=TILE, warps=warps)
    tile = _tile(routed, attended)
    kernels = {
        "write_nodes": (WRITE_NODES.arguments, Tile(tile.nodes, NODE, warps=4, stages=1)),
        "choose": (CHOOSE.arguments, _CHOOSE),
        "attend_chosen": (ATTEND_CHOSEN.arguments, attended),
    }
    num_rows = first.schedule.num_rows
    sources = []
    for phase, (arguments, own_tile) in kernels.items():
        text = render_template(
            f"gpu/router/{phase}.py.jinja",
            shape=first.shape,
            tile=tile,
            num_rows=None if num_rows == UNBOUNDED else num_rows,
            arguments=arguments,
            steps=repr(_STEPS),
            to_whole=repr(_TO_WHOLE),
            last_block=_LAST_BLOCK,
            nothing=_NOTHING,
            log2_e=repr(math.log2(math.e)),
        )
        files = (SourceFile(f"{first.target.folder}/{phase}.py", text),)
        read = {name: tables[name] for name in decode.wanted_tables(routed)} if phase == "choose" else {}
        table = decode.TABLE.name if read else ""
        sources.append(GpuSource(first.target, routed, files, phase, own_tile, (), table, read))
    return tuple(sources)


def _tile(specs: Sequence[GpuSpec], attended: Tile) -> RouterTile:
    shape = specs[0].shape
    padded_head_dim = max(32, padded(shape.head_dim))  # the fewest terms that an 8-bit matrix instruction sums over
    nodes = _NODE_CHANNELS // padded_head_dim
    return RouterTile(
        node=NODE,
        node_shift=log2(NODE),
        half_node=NODE // 2,
        nodes=nodes,
        node_keys=nodes * NODE,
        padded_group=padded(shape.heads_per_kv_head),
        padded_head_dim=padded_head_dim,
        block_shift=log2(shape.block_size),
        nodes_per_block=shape.block_size // NODE,
        queries=TILE,
        query_shift=log2(TILE),
        most_singles=MOST_SINGLES,
        slots=_SLOTS,
        chunk=max(_SLOTS, padded(max(head.route for spec in specs for head in spec.schedule.heads))),
        keys=attended.keys,
        key_shift=log2(attended.keys),
        tiles_per_block=shape.block_size // attended.keys,
        tile_to_block_shift=log2(shape.block_size // attended.keys),
    )
