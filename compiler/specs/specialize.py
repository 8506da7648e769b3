"""From schedules to kernel specifications: one kernel for each distinct layer schedule, as the target can hold it."""

from collections.abc import Mapping, Sequence

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.specs.artifacts import KernelSpec
from surgeon.compiler.specs.tiles import TargetTiles, tiles_of
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import TargetError, shown
from surgeon.runtime.package.target import Target

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


def specialize(
    topology: Topology,
    layers: Sequence[LayerSchedule],
    target: Target,
    dtypes: Sequence[str] | None = None,
    tiles: Mapping[Target, TargetTiles] | None = None,
) -> tuple[KernelSpec, ...]:
    """The kernels that a target needs, in the order of their first layers.

    `dtypes` restricts the storage types; None means every one of the target. `tiles` come before Surgeon's own.

    Raises:
        TargetError: a dtype, head size or block size that the target cannot hold.
    """
    if dtypes is not None and not dtypes:
        raise TargetError("dtypes", "at least one", "none", "leave it out for every dtype of the target")
    for dtype in dtypes or ():
        if dtype not in target.dtypes:
            raise TargetError(
                f"dtype {dtype}",
                f"one of {', '.join(target.dtypes)} for {target}",
                shown(dtype),
                "leave it out or change the target",
            )
    check_head_dim(topology.model.head_dim)
    if target.backend != "cpu" and topology.block_size & (topology.block_size - 1):
        raise TargetError(
            "block_size",
            f"a power of two for {target}",
            str(topology.block_size),
            "learn the topology with blocks of 32, 64 or 128",
        )
    own = None if target.backend == "cpu" else tiles_of(target, tiles)
    if own is not None:
        own.prefill_tile(topology.model.head_dim, topology.block_size)  # or the target cannot hold the kernels
    sharers: dict[LayerSchedule, list[int]] = {}
    for index in topology.covered:
        sharers.setdefault(layers[index], []).append(index)
    return tuple(
        KernelSpec(
            name=f"attention_{number:03d}",
            target=target,
            dtypes=tuple(dtype for dtype in target.dtypes if dtypes is None or dtype in dtypes),
            layers=tuple(indices),
            schedule=layer,
            head_dim=topology.model.head_dim,
            tiles=own,
        )
        for number, (layer, indices) in enumerate(sharers.items())
    )


def check_head_dim(head_dim: int) -> None:
    """Refuses a head size that no kernel template has.

    Raises:
        TargetError: it is one.
    """
    if head_dim not in HEAD_DIMS:
        raise TargetError(
            "model.head_dim",
            f"one of {', '.join(map(str, HEAD_DIMS))}",
            str(head_dim),
            "no kernel template has this head size",
        )
