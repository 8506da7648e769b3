"""vLLM's CPU backend with a package's kernels in the layers that it covers; other layers keep vLLM's own code.

Source: `vllm.v1.attention.backends.cpu_attn`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from surgeon.runtime.cache.liveness import Liveness
from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package
from surgeon.runtime.packed_batch import PackedBatch
from surgeon.runtime.vllm.batch import dense_tails
from surgeon.runtime.vllm.freeing import PatternSpec, by_need
from surgeon.runtime.vllm.hooks import replace
from surgeon.runtime.vllm.layers import check_sharing, covered_by, report
from surgeon.runtime.vllm.pages.layout import PageLayout
from surgeon.runtime.vllm.pages.nodes import PageNodes
from surgeon.runtime.vllm.prompts import noting_prompts, prompt_lengths
from surgeon.runtime.vllm.serving import serving

replace(GPUModelRunner, "_build_attention_metadata", noting_prompts)
replace(Attention, "get_kv_cache_spec", by_need)


@dataclass(frozen=True)
class Site:
    """A layer that runs on the package's kernels: those of this process's heads, the layer's index, and the pages.

    `nodes` are those of the worker's caches, None for a layer without routed heads.
    """

    package: Package
    layer: int
    pages: PageLayout
    nodes: PageNodes | None


@dataclass(kw_only=True)
class SurgeonCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step, with the batch that all layers of a group attend to."""

    batch: PackedBatch


class SurgeonCPUBackend(CPUAttentionBackend):
    """The backend that stands for vLLM's CPU_ATTN, whose name it keeps since vLLM asks for it."""

    @staticmethod
    def get_impl_cls() -> type["SurgeonCPUImpl"]:
        """The attention of one layer."""
        return SurgeonCPUImpl

    @staticmethod
    def get_builder_cls() -> type["SurgeonCPUBuilder"]:
        """The builder of a step's metadata."""
        return SurgeonCPUBuilder


class SurgeonCPUBuilder(CPUAttentionMetadataBuilder):
    """Binds the layers of a group to the kernels when the server starts, and builds each step's metadata.

    Raises:
        SurgeonError: the package cannot be used, or a layer that it covers is not what its kernels compute.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = serving(vllm_config)
        self.pages: PageLayout | None = None
        self.liveness: Liveness | None = None  # of the group, where pages are freed
        if found is None:
            return
        self.asking = found.options.asking
        covered = covered_by(found, vllm_config, layer_names, kv_cache_spec, SurgeonCPUImpl)
        if covered is not None:
            every = get_layers_from_vllm_config(vllm_config, Attention)
            check_sharing(every, covered.layers)
            heads, manifest = len(covered.package.kv_heads), found.package.manifest
            self.pages = PageLayout(kv_cache_spec.block_size, heads, manifest.block_size)
            nodes = _nodes_of(every)
            for name, layer in covered.layers.items():
                index = covered.indices[name]
                own_nodes = nodes if index in manifest.routed else None
                layer.impl.site = Site(covered.package, index, self.pages, own_nodes)
            if isinstance(kv_cache_spec, PatternSpec):
                self.liveness = Liveness(torch.tensor([kv_cache_spec.readers]))
        report(found, vllm_config, found.package.cpu_variant)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """Builds a step's metadata, once for all layers of the group.

        Raises:
            PatchError: the step is not one of causal attention, or nobody says where its prompts end.
        """
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.pages is None:
            return built
        if common_attn_metadata.causal is not True:
            raise PatchError("vLLM's step", "causal attention", "another one", "serve this model without a package")
        lengths = common_attn_metadata.seq_lens
        starts = common_attn_metadata.query_start_loc_cpu
        prompts = prompt_lengths(len(lengths))
        if prompts is None:
            raise PatchError(
                "vLLM's step",
                "a model runner that tells the prompts' lengths",
                "another one",
                "serve without a package",
            )
        positions = (lengths - starts.diff()).long()
        table = self.pages.block_table(common_attn_metadata.block_table_tensor, lengths)
        if self.liveness is not None:  # vLLM leaves freed pages in the table: to read one is to be an error
            live = self.liveness.live(positions // self.pages.block_size, table.shape[2])
            table.masked_fill_(~live, -1)
        tails = dense_tails(lengths, prompts, self.asking)
        batch = PackedBatch(starts, positions, tails, table, self.pages.block_size, self.liveness is not None)
        known = {field.name: getattr(built, field.name) for field in fields(CPUAttentionMetadata)}
        return SurgeonCPUMetadata(**known, batch=batch)


class SurgeonCPUImpl(CPUAttentionBackendImpl):
    """The attention of one layer: on the package's kernels where the layer has a site, else vLLM's own."""

    site: Site | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes new keys and values `[tokens, KV heads, head_dim]` into their pages, in natural order."""
        if self.site is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        self.site.package.kernels.write_pages(key, value, slot_mapping, kv_cache)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens `[tokens, heads, head_dim]` over their sequences' pages, into `output`."""
        if self.site is None or attn_metadata is None or output_scale is not None or output_block_scale is not None:
            rest = (attn_metadata, output, output_scale, output_block_scale)  # also a run without a cache, to warm up
            own: torch.Tensor = super().forward(layer, query, key, value, kv_cache, *rest)
            return own
        site = self.site
        keys, values = site.pages.pools(kv_cache)
        shape = (-1, self.num_heads, self.head_size)
        tensors = query.view(shape), keys, values, self.scale, output.view(shape)
        nodes = None if site.nodes is None else site.nodes.of(keys, site.pages)
        site.package.kernels.run_packed(site.layer, attn_metadata.batch, *tensors, nodes)
        return output


def _nodes_of(layers: Mapping[str, Attention]) -> PageNodes:
    """The nodes of this worker's caches, made with its first group of layers."""
    sites = (getattr(layer.impl, "site", None) for layer in layers.values())
    return next((site.nodes for site in sites if site is not None and site.nodes is not None), None) or PageNodes()
