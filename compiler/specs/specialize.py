"""Schedules ─▶ kernel specifications: one kernel per distinct layer schedule, if the target can hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgeon.compiler.schedule.liveness import Ints
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import MAX_GROUP
from surgeon.compiler.specs.kernel_spec import CpuSpec, GpuSpec, KernelSpec
from surgeon.compiler.specs.tiles import TargetTiles, tiles_of
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import TargetError, short_repr
from surgeon.runtime.package.target import Target

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)

MAX_ROUTE = 64
"""The most blocks that a head may choose on a GPU: a program keeps and sorts as many."""

Tiles = Mapping[Target, TargetTiles]
"""A user's own tile tables."""

LastReaders = Mapping[LayerSchedule, Ints]
"""The liveness table of each distinct layer that is covered."""


def specialize_cpu(
    topology: Topology,
    layers: Sequence[LayerSchedule],
    target: Target,
    dtypes: Sequence[str] | None,
    _tiles: Tiles | None,
    last_readers: LastReaders,
    _paged: bool = False,
) -> tuple[CpuSpec, ...]:
    """Specifies the kernels that a CPU library needs, in the order of their first layers.

    `dtypes` restricts the storage types; None means all of the target's.

    Raises:
        TargetError: there is no kernel for a dtype or the head size.
    """
    specs = _specs(topology, layers, target, dtypes)
    return tuple(CpuSpec(**vars(spec), last_readers=last_readers[spec.schedule]) for spec in specs)


def specialize_gpu(
    topology: Topology,
    layers: Sequence[LayerSchedule],
    target: Target,
    dtypes: Sequence[str] | None = None,
    tiles: Tiles | None = None,
    _last_readers: LastReaders | None = None,
    paged: bool = False,
) -> tuple[GpuSpec, ...]:
    """Specifies the kernels that a GPU needs, with their tiles; `tiles` take precedence over the built-in ones.

    With `paged` there are also kernels for keys and values in pages.

    Raises:
        TargetError: the target does not support a dtype, the head size or the block size, or pages with routed heads.
    """
    specs = _specs(topology, layers, target, dtypes)
    if topology.block_size & (topology.block_size - 1):
        raise TargetError(
            "block_size",
            f"a power of two for {target}",
            str(topology.block_size),
            "learn the topology with blocks of 32, 64 or 128",
        )
    own, shape = tiles_of(target, tiles), specs[0].shape
    prefill = own.prefill_tile(shape.head_dim, shape.block_size, shape.heads_per_kv_head)
    decode = None
    if shape.heads_per_kv_head <= MAX_GROUP:
        decode = own.decode_tile(shape.head_dim, shape.block_size, shape.heads_per_kv_head)
    _check_routes(specs, target, decode is not None, paged)
    made = (GpuSpec(**vars(spec), device=own.device, prefill=prefill, decode=decode) for spec in specs)
    if not paged:
        return tuple(made)
    in_pages = own.paged_prefill_tile(shape.head_dim, shape.block_size, shape.heads_per_kv_head)
    paged_decode = None if decode is None else own.for_pages(decode)
    return tuple(replace(spec, paged_prefill=in_pages, paged_decode=paged_decode) for spec in made)


def _check_routes(specs: Sequence[KernelSpec], target: Target, in_tables: bool, paged: bool) -> None:
    """Refuses routed heads with more blocks than a program can sort, of KV heads that fit into no table, or in pages.

    Raises:
        TargetError: there are such heads.
    """
    routes = [head.route for spec in specs for head in spec.schedule.heads]
    if paged and any(routes):
        raise TargetError(
            "route",
            f"no heads that choose blocks in kernels for pages, for {target}",
            f"{max(routes)} blocks",
            "compile without paged kernels, or without routes",
        )
    if max(routes) > MAX_ROUTE:
        raise TargetError(
            "route",
            f"at most {MAX_ROUTE} blocks for {target}",
            str(max(routes)),
            "compile it for cpu, or learn the topology with larger blocks",
        )
    if any(routes) and not in_tables:
        raise TargetError(
            "route",
            f"at most {MAX_GROUP} query heads per KV head where heads choose blocks, for {target}",
            str(specs[0].shape.heads_per_kv_head),
            "compile it for cpu, or without routes",
        )


def check_head_dim(head_dim: int) -> None:
    """Refuses a head size that no kernel template supports.

    Raises:
        TargetError: no kernel template supports it.
    """
    if head_dim not in HEAD_DIMS:
        raise TargetError(
            "model.head_dim",
            f"one of {', '.join(map(str, HEAD_DIMS))}",
            str(head_dim),
            "no kernel template supports this head size",
        )


def _specs(
    topology: Topology, layers: Sequence[LayerSchedule], target: Target, dtypes: Sequence[str] | None
) -> tuple[KernelSpec, ...]:
    if dtypes is not None and not dtypes:
        raise TargetError("dtypes", "at least one", "none", "leave it out for every dtype of the target")
    for dtype in dtypes or ():
        if dtype not in target.dtypes:
            raise TargetError(
                f"dtype {dtype}",
                f"one of {', '.join(target.dtypes)} for {target}",
                short_repr(dtype),
                "leave it out or change the target",
            )
    check_head_dim(topology.model.head_dim)
    topology_sha256 = topology.sha256
    sharers: dict[LayerSchedule, list[int]] = {}
    for index in topology.covered:
        sharers.setdefault(layers[index], []).append(index)
    return tuple(
        KernelSpec(
            topology_sha256=topology_sha256,
            name=f"attention_{number:03d}",
            target=target,
            dtypes=tuple(dtype for dtype in target.dtypes if dtypes is None or dtype in dtypes),
            layers=tuple(indices),
            schedule=layer,
            head_dim=topology.model.head_dim,
        )
        for number, (layer, indices) in enumerate(sharers.items())
    )
