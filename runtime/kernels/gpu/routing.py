"""Routed heads on a GPU: their routers in its memory, and the kernels that run before those that read the schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.gpu.kernel import Kernel
from surgeon.runtime.package.interface import ROUTER_PHASES
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.schedule import MOST_SINGLES, NODE, TILE
from surgeon.runtime.package.topology_facts import FILE as TOPOLOGY
from surgeon.runtime.package.topology_facts import read_router

PARTS = 4
"""The programs that share the chosen blocks of a head in decoding: they are few, and one would read them in turn."""


@dataclass(frozen=True)
class LayerRoutes:
    """A layer's routes and router in a GPU's memory, held by `parts`, and the arguments by name of its kernels.

    `most_chosen` is the most blocks that one of its heads chooses.
    """

    arguments: Mapping[str, int]
    most_chosen: int
    parts: tuple[torch.Tensor, ...]


def load_routes(files: PackageFiles, device: int) -> dict[int, LayerRoutes]:
    """Copies the routes and routers of a package's routed layers to a GPU, by layer.

    Raises:
        PackageError: the package's schedules or its router are damaged.
    """
    found = {}
    for layer, router in read_router(files.files[TOPOLOGY], files.manifest, f"{files.folder}/{TOPOLOGY}").items():
        routes = [head.route for head in files.schedules[layer].heads]
        parts = (
            torch.tensor(routes, dtype=torch.int32, device="cpu").cuda(device),
            torch.from_numpy(router.centre).cuda(device),
            torch.from_numpy(router.scale).cuda(device),
        )
        addresses = zip(("routes", "key_centre", "key_scale"), parts, strict=True)
        found[layer] = LayerRoutes({name: part.data_ptr() for name, part in addresses}, max(routes), parts)
    return found


def num_slots(q_length: int) -> int:
    """The most units that a call's queries choose in: whole tiles, and single ones before and behind them."""
    return min(q_length, MOST_SINGLES) + q_length // TILE


def router_kernels(
    kernels: Mapping[tuple[str, int, torch.dtype], Sequence[Kernel]], layer: int, dtype: torch.dtype, where: str
) -> list[Kernel]:
    """A routed layer's kernels that come first, in their order.

    Raises:
        PackageError: the package lacks one.
    """
    missing = [phase for phase in ROUTER_PHASES if (phase, layer, dtype) not in kernels]
    if missing:
        expected = f"a kernel {missing[0]} for layer {layer}, which has routed heads"
        raise PackageError(where, expected, "none", "compile the package again")
    return [kernels[phase, layer, dtype][0] for phase in ROUTER_PHASES]


def attend_chosen(
    kernels: Sequence[Kernel],
    routes: LayerRoutes,
    lengths: Mapping[str, int],
    stream: int,
    values: Mapping[str, int | float],
    q: torch.Tensor,
    k: torch.Tensor,
) -> None:
    """Queues the kernels up to attention over chosen blocks, whose places are in `values`; `kernels` are the router's.

    The nodes of all keys are made for this call. Nothing waits for the device: the number of blocks is known.
    """
    (batch, heads, q_length, head_dim), (kv_heads, k_length) = q.shape, k.shape[1:3]
    num_nodes, slots = k_length // NODE, num_slots(q_length)
    nodes = q.new_empty((batch, kv_heads, num_nodes, head_dim), dtype=torch.int8)
    chosen = q.new_empty((batch, heads, slots, routes.most_chosen), dtype=torch.int32)
    write_nodes, choose, attend = kernels
    values = {
        **values,
        **routes.arguments,
        "nodes": nodes.data_ptr(),
        "chosen": chosen.data_ptr(),
        "num_nodes": num_nodes,
        "num_slots": slots,
        "most_chosen": routes.most_chosen,
    }
    lengths = {
        **lengths,
        "node_tiles": -(-num_nodes // write_nodes.tile_rows),
        "slot_tiles": -(-slots // choose.tile_rows),
        "slot_parts": slots * int(values["num_parts"]),
    }
    for kernel in (write_nodes, choose, attend) if num_nodes else (choose, attend):
        kernel.launch(lengths, stream, values, q)
