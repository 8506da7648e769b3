"""The plugin's backend for GPUs in vLLM's engine on a CPU, its kernels in Triton's interpreter.

Importing it needs vLLM.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from paged_calls import PagedCall, launch_paged, paged_sources
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.kernels.run import LayerKernels
from surgeon.runtime.packed_batch import DeviceBatch
from surgeon.runtime.vllm.gpu_backend import SurgeonGPUBackend, SurgeonGPUImpl
from surgeon.runtime.vllm.hooks import CPU_BACKEND
from triton_interpreter import interpreter

SPLITS = 3


class InterpretedImpl(SurgeonGPUImpl):
    """The attention of a layer, with torch for vLLM's op in Triton that writes keys and values."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        assert layer is not None
        page, place = slot_mapping // kv_cache.shape[2], slot_mapping % kv_cache.shape[2]
        kv_cache[page, :, place] = torch.cat((key, value), dim=2)[: len(slot_mapping)]


class InterpretedBackend(SurgeonGPUBackend):
    """The backend under the name that vLLM expects on a CPU."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SurgeonGPUImpl]:
        return InterpretedImpl


@contextmanager
def interpreted(topology: Topology) -> Iterator[list[DeviceBatch]]:
    """Makes engines in this process run a topology's layers by the backend for GPUs; yields the batches of calls."""
    load_general_plugins()  # which registers the backend for CPUs, once in a process
    batches: list[DeviceBatch] = []
    with interpreter() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerKernels, "run_pages", _running(topology, pool, batches))
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{InterpretedBackend.__name__}")
        selector._cached_get_attn_backend.cache_clear()
        try:
            yield batches
        finally:
            register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
            selector._cached_get_attn_backend.cache_clear()


def _running(topology: Topology, pool: Executor, batches: list[DeviceBatch]) -> Any:
    """What stands for `LayerKernels.run_pages`."""
    sources = {layer: paged_sources(topology, layer) for layer in topology.covered}

    def run_pages(
        kernels: LayerKernels,
        layer: int,
        batch: DeviceBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        batches.append(batch)
        held, table = torch.unique(batch.block_table, return_inverse=True)  # a small part of the cache
        call = PagedCall(
            sources=sources[layer],
            block_size=topology.block_size,
            q=q.numpy(),
            cache=torch.cat((k[held.long()], v[held.long()]), dim=3).numpy(),
            query_start=batch.query_start.numpy(),
            lengths=batch.lengths.numpy(),
            dense_from=batch.dense_from.numpy(),
            block_table=table.to(torch.int32).numpy(),
            scale=scale,
            num_splits=SPLITS,
            first_kv_head=kernels.kv_heads.start,
        )
        out.copy_(torch.from_numpy(pool.submit(launch_paged, call).result()))

    return run_pages
