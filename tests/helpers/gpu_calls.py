"""Calls of the GPU launcher for its tests: the arguments, and the records of a stand-in driver."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_standin import Standin, unpacked
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.kernels import GpuKernels
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target
from topologies import window_topology

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 128, 128
STREAM = 0x5EED
PROCESSORS = 6
TARGETS = {"cuda": "cuda:90", "hip": "hip:gfx942"}


def topology(beyond: str = "window") -> Any:
    return window_topology(
        [1, 2, 1, 2], num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, num_layers=2, beyond=beyond
    )


only_cuda = pytest.mark.parametrize("way", ["cuda.core", "cuda"])
by_any_way = pytest.mark.parametrize("way", ["cuda"])  # these tests do not depend on the driver
LOADS = {"cuda.core": "cuLibraryLoadData", "cuda": "cuModuleLoadData", "hip": "hipModuleLoadData"}
LAUNCHES = {"cuda.core": "cuLaunchKernelEx", "cuda": "cuLaunchKernel", "hip": "hipModuleLaunchKernel"}
OCCUPANCY = {
    "cuda": "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "hip": "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor",
}
ATTRIBUTES = {"cuda.core": "cuKernelSetAttribute", "cuda": "cuFuncSetAttribute"}


def tensors(q_length: int, k_length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q as a transposed view, as projections leave it; k and v in the layout of a cache."""
    q = torch.zeros((batch, q_length, HEADS, HEAD_DIM), dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.zeros((2, batch, KV_HEADS, k_length, HEAD_DIM), dtype=torch.bfloat16)
    return q, k, v


def second_kv_head(q_length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of only the second KV head, as views of the whole tensors."""
    q, k, v = tensors(q_length, k_length=700)
    return q[:, HEADS // KV_HEADS :], k[:, 1:], v[:, 1:]


def kernels(files: PackageFiles, backend: str, driver: Driver, device: int = 0, strict: bool = True) -> GpuKernels:
    return GpuKernels(files, Target.parse(TARGETS[backend]), device, PROCESSORS, strict, driver)


def entry_of(files: PackageFiles, backend: str, phase: str = "prefill") -> KernelEntry:
    return next(
        kernel for kernel in files.manifest.kernels if (kernel.target, kernel.phase) == (TARGETS[backend], phase)
    )


def launches(standin: Standin) -> list[dict[str, Any]]:
    return [call for call in standin.log() if call["call"] in LAUNCHES.values()]


def arguments(entry: KernelEntry, launch: dict[str, Any]) -> dict[str, int | float]:
    values = unpacked(launch["values"], [argument.type for argument in entry.arguments])
    return dict(zip((argument.name for argument in entry.arguments), values, strict=True))


def changed(files: PackageFiles, backend: str, change: Callable[[KernelEntry], KernelEntry]) -> PackageFiles:
    entries = tuple(
        change(kernel) if kernel.target == TARGETS[backend] else kernel for kernel in files.manifest.kernels
    )
    return dataclasses.replace(files, manifest=dataclasses.replace(files.manifest, kernels=entries))


def with_launch(phase: str = "", **fields: Any) -> Callable[[KernelEntry], KernelEntry]:
    """A change of some fields of an entry's launch, of all entries or of those of a phase."""

    def change(entry: KernelEntry) -> KernelEntry:
        if phase and entry.phase != phase:
            return entry
        assert entry.launch is not None
        return dataclasses.replace(entry, launch=dataclasses.replace(entry.launch, **fields))

    return change
