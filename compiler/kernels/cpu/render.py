"""Renders kernel specifications as the C++ of one CPU library: kernels per instruction set, driver, schedule."""

import numpy as np

from surgeon.compiler.kernels.cpu.variants import TileVariant, Variant
from surgeon.compiler.specs.artifacts import CpuSource, SourceFile
from surgeon.compiler.specs.kernel_spec import CpuSpec
from surgeon.compiler.system.jinja import render_template
from surgeon.compiler.topology.router import LayerRouter
from surgeon.runtime.package.kernel_digest import digest_symbol
from surgeon.runtime.package.manifest import CPU_ABI_VERSION
from surgeon.runtime.package.schedule import NODE, TILE, HeadSchedule
from surgeon.runtime.package.target import DTYPES

_TYPES = dict(zip(DTYPES, ("float", "BFloat16", "Half"), strict=True))
_CHUNK = 128  # keys
_DENSE_QUERIES = 32  # the largest panel; more would leave threads without work at a prompt's end
_TILE_STEP = 64  # keys: with a panel's q and outputs, what the L1 cache holds
_TILE_CHUNK = 512  # keys
_DECODE_CHUNK_ELEMENTS = 4096  # keys, and as many values: fits the L1 cache as floats
_SPLIT_KEYS = 256
_SPLITS_PER_THREAD = 4
# The least work worth waking a thread for: waking one takes some tens of microseconds.
_OPERATIONS_PER_THREAD = 20e6
_BYTES_PER_THREAD = 0.5e6
_NODES_AT_ONCE = 64
_UNITS_AT_ONCE = 8
_WORTH_PACKING = 16  # units, over which the cost of packing is spread
_TOKENS_AT_ONCE = 64
_WITHOUT_CONTRACTIONS = "-ffp-contract=off"  # else sums of products would depend on the instruction set


def render_cpu(specs: tuple[CpuSpec, ...], variants: tuple[Variant | TileVariant, ...]) -> CpuSource:
    """Renders the C++ sources of one library that holds the kernels of all specifications."""
    dtypes = {dtype: _TYPES[dtype] for dtype in specs[0].dtypes}
    routed = any(spec.schedule.router for spec in specs)
    files = {
        "call.h": render_template(
            "cpu/call/call.h.jinja",
            head_dim=specs[0].head_dim,
            block_size=specs[0].schedule.block_size,
            abi_version=CPU_ABI_VERSION,
            dtypes=DTYPES,
            node_keys=NODE,
            tile_queries=TILE,
        ),
        "visible.h": render_template("cpu/visible.h.jinja", chunk=_CHUNK, dense_queries=_DENSE_QUERIES),
        "check.h": render_template("cpu/call/check.h.jinja"),
        "threads.h": render_template(
            "cpu/threads.h.jinja", operations_per_thread=_OPERATIONS_PER_THREAD, bytes_per_thread=_BYTES_PER_THREAD
        ),
        "vectors.h": render_template("cpu/vectors.h.jinja"),
        "chunk.h": render_template("cpu/chunk.h.jinja"),
        "pairs.h": render_template("cpu/pairs.h.jinja"),
        "rotary.h": render_template("cpu/rotary.h.jinja"),
        "prefill.h": render_template("cpu/prefill.h.jinja", routed=routed),
        "decode.h": render_template("cpu/decode.h.jinja", decode_chunk=_DECODE_CHUNK_ELEMENTS // specs[0].head_dim),
        "driver.cpp": render_template(
            "cpu/driver.cpp.jinja",
            variants=variants,
            split_keys=_SPLIT_KEYS,
            splits_per_thread=_SPLITS_PER_THREAD,
            routed=routed,
        ),
        "direct.cpp": render_template("cpu/call/direct.cpp.jinja", dtypes=DTYPES),
        "write.cpp": render_template("cpu/pages/write.cpp.jinja", tokens_at_once=_TOKENS_AT_ONCE),
        "schedule.cpp": _render_schedule(specs),
    }
    for variant in variants:
        if isinstance(variant, TileVariant):
            files |= _render_tiles(variant, routed)
        else:
            files[f"{variant.name}.cpp"] = render_template("cpu/variant.cpp.jinja", variant=variant, dtypes=dtypes)
    flags = {f"cpu/{variant.name}.cpp": variant.flags for variant in variants}
    if routed:
        files |= _render_router(variants, dtypes)
        routers = {f"cpu/router_{variant.name}.cpp": variant.flags for variant in variants if variant.rest is None}
        flags |= {name: (*own, _WITHOUT_CONTRACTIONS) for name, own in routers.items()}
    return CpuSource(
        target=specs[0].target,
        specs=specs,
        files=tuple(SourceFile(f"cpu/{name}", text) for name, text in files.items()),
        flags=flags,
    )


def _render_tiles(variant: TileVariant, routed: bool) -> dict[str, str]:
    return {
        "tiles.h": render_template(f"cpu/tiles/{variant.unit}.h.jinja"),
        "pack_tiles.h": render_template("cpu/tiles/pack.h.jinja"),
        "prefill_tiles.h": render_template(
            "cpu/tiles/prefill.h.jinja", step=_TILE_STEP, chunk=_TILE_CHUNK, routed=routed
        ),
        f"{variant.name}.cpp": render_template("cpu/tiles/variant.cpp.jinja", variant=variant),
    }


def _render_router(variants: tuple[Variant | TileVariant, ...], dtypes: dict[str, str]) -> dict[str, str]:
    return {
        "route.h": render_template(
            "cpu/router/route.h.jinja",
            nodes_at_once=_NODES_AT_ONCE,
            units_at_once=_UNITS_AT_ONCE,
            worth_packing=_WORTH_PACKING,
        ),
        "chosen.h": render_template("cpu/router/chosen.h.jinja"),
        "scores.h": render_template("cpu/router/scores.h.jinja"),
        "packed.h": render_template("cpu/router/packed.h.jinja"),
        "pick.h": render_template("cpu/router/pick.h.jinja"),
        "choose.h": render_template("cpu/router/choose.h.jinja", node_shift=NODE.bit_length() - 1),
        **{
            f"router_{variant.name}.cpp": render_template(
                "cpu/router/variant.cpp.jinja", variant=variant, dtypes=dtypes
            )
            for variant in variants
            if variant.rest is None
        },
    }


def _render_schedule(specs: tuple[CpuSpec, ...]) -> str:
    numbers: dict[HeadSchedule, int] = {}
    for spec in specs:
        for head in spec.schedule.heads:
            numbers.setdefault(head, len(numbers))
    layers = [
        {
            "name": spec.name,
            "symbol": spec.symbol,
            "digest": spec.digest,
            "digest_symbol": digest_symbol(spec.symbol),
            "heads": [numbers[head] for head in spec.schedule.heads],
            "num_key_value_heads": spec.schedule.num_key_value_heads,
            "group": len(spec.schedule.heads) // spec.schedule.num_key_value_heads,
            "block_size": spec.schedule.block_size,
            "num_rows": spec.schedule.num_rows,
            "router": spec.schedule.router and _floats(spec.schedule.router),
        }
        for spec in specs
    ]
    return render_template("cpu/schedule.cpp.jinja", heads=list(numbers), layers=layers)


def _floats(router: LayerRouter) -> dict[str, list[str]]:
    """The router's numbers as C++ floats, all KV heads one behind the other, without loss."""
    parts = {"centre": router.centre, "scale": router.scale}
    return {name: [f"{float(np.float32(x)).hex()}f" for row in rows for x in row] for name, rows in parts.items()}
