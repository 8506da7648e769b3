"""vLLM's CPU backend with a package's kernels in the layers that it covers; other layers keep vLLM's own code.

Source: `vllm.v1.attention.backends.cpu_attn`.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
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
from surgeon.runtime.vllm.compatibility import covered_layers
from surgeon.runtime.vllm.freeing import PatternSpec, by_need
from surgeon.runtime.vllm.hooks import replace
from surgeon.runtime.vllm.pages.layout import PageLayout
from surgeon.runtime.vllm.pages.nodes import PageNodes
from surgeon.runtime.vllm.prompts import noting_prompts, prompt_lengths
from surgeon.runtime.vllm.serving import Serving, serving

_LOG = init_logger("vllm.surgeon")

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
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        covered = covered_layers(vllm_config.model_config.hf_config, found.package.manifest)
        ours = {name: layer for name, layer in layers.items() if extract_layer_index(name) in covered}
        every = get_layers_from_vllm_config(vllm_config, Attention)
        if ours:
            _check_sharing(every, ours)
            self._bind(found, ours, every, kv_cache_spec)
        if get_tensor_model_parallel_rank() == 0:
            _LOG.info_once(_report(found, sorted(map(extract_layer_index, every)), covered))

    def _bind(
        self, found: Serving, layers: dict[str, Attention], every: Mapping[str, Attention], kv_cache_spec: Any
    ) -> None:
        manifest = found.package.manifest
        heads = manifest.model.num_key_value_heads // get_tensor_model_parallel_world_size()
        rank = get_tensor_model_parallel_rank()
        package = found.package.part(range(rank * heads, (rank + 1) * heads))
        self.pages = PageLayout(kv_cache_spec.block_size, heads, manifest.block_size)
        if kv_cache_spec.block_size % manifest.block_size or kv_cache_spec.num_kv_heads != heads:
            raise PatchError(
                "vLLM's pages",
                f"{heads} KV heads and a multiple of {manifest.block_size} tokens",
                f"{kv_cache_spec.num_kv_heads} KV heads and {kv_cache_spec.block_size} tokens",
                "serve with another --block-size",
            )
        nodes = _nodes_of(every)
        for name, layer in layers.items():
            _check_layer(name, layer, manifest.model.head_dim)
            index = extract_layer_index(name)
            layer.impl.site = Site(package, index, self.pages, nodes if index in manifest.routed else None)
        if isinstance(kv_cache_spec, PatternSpec):
            self.liveness = Liveness(torch.tensor([kv_cache_spec.readers]))

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


def _check_layer(name: str, layer: Attention, head_dim: int) -> None:
    """Refuses a layer, covered by the package, whose attention is not what the kernels compute.

    Raises:
        PatchError: it is another kind of attention.
    """
    impl = layer.impl
    if not isinstance(impl, SurgeonCPUImpl):
        raise PatchError(f"{name}: backend", "the plugin's", type(impl).__name__, "serve this model without a package")
    expected: dict[str, tuple[object, object]] = {
        "sliding_window": (layer.sliding_window, None),
        "logits_soft_cap": (impl.logits_soft_cap or None, None),
        "alibi_slopes": (impl.alibi_slopes, None),
        "sinks": (impl.sinks, None),
        "kv_sharing_target_layer_name": (layer.kv_sharing_target_layer_name, None),
        "attn_type": (AttentionType(layer.attn_type).value, AttentionType.DECODER.value),
        "head_size": (layer.head_size, head_dim),
        "head_size_v": (layer.head_size_v, head_dim),
    }
    for what, (got, wanted) in expected.items():
        if (got is None) != (wanted is None) or (wanted is not None and got != wanted):
            raise PatchError(f"{name}: {what}", str(wanted), str(got), "serve this model without a package")


def _nodes_of(layers: Mapping[str, Attention]) -> PageNodes:
    """The nodes of this worker's caches, made with its first group of layers."""
    sites = (getattr(layer.impl, "site", None) for layer in layers.values())
    return next((site.nodes for site in sites if site is not None and site.nodes is not None), None) or PageNodes()


def _check_sharing(every: Mapping[str, Attention], ours: Container[str]) -> None:
    """Refuses a layer that reads the cache of one of ours, whose pages have another order than vLLM's kernels expect.

    Raises:
        PatchError: there is one.
    """
    for name, layer in every.items():
        if (target := layer.kv_sharing_target_layer_name) in ours:
            raise PatchError(
                f"{name}: kv_sharing_target_layer_name",
                "a layer with a cache of its own",
                f"one that reads the cache of {target}",
                "serve this model without a package",
            )


def _report(found: Serving, layers: Sequence[int], covered: Sequence[int]) -> str:
    """Says in one line which of a process's layers run on which kernels."""
    package, options = found.package, found.options
    ours, own = ([layer for layer in layers if (layer in covered) == is_ours] for is_ours in (True, False))
    kernels = f"{package.cpu_variant} kernels of package {package.id[:12]}, recall {options.recall}"
    asking = f", the last {options.dense_rows} tokens of a prompt read everything" if options.asking else ""
    parts = [f"layers {_ranges(ours)} run on {kernels}{asking}"] if ours else []
    parts += [f"layers {_ranges(own)} on vLLM's own"] if own else []
    return "surgeon: " + "; ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    ends: list[list[int]] = []
    for number in numbers:
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
