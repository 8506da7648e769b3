"""vLLM's Triton backend with a package's kernels in the layers that it covers; other layers keep vLLM's own code.

Keys and values lie in pages as vLLM's own Triton kernels keep them, and vLLM's op writes them. A step is described by
tensors of the device alone, at addresses that stay, so that a captured graph of a decoding step follows the engine.

Source: `vllm.v1.attention.backends.triton_attn`.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package
from surgeon.runtime.packed_batch import NO_DENSE_ROWS, DeviceBatch
from surgeon.runtime.vllm.batch import dense_from
from surgeon.runtime.vllm.hooks import replace
from surgeon.runtime.vllm.layers import covered_by, report
from surgeon.runtime.vllm.prompts import noting_prompts, prompt_lengths
from surgeon.runtime.vllm.serving import serving

replace(GPUModelRunner, "_build_attention_metadata", noting_prompts)


@dataclass(frozen=True)
class Site:
    """A layer that runs on the package's kernels: those of this process's heads, and the layer's index."""

    package: Package
    layer: int


@dataclass(kw_only=True)
class SurgeonGPUMetadata(TritonAttentionMetadata):
    """vLLM's metadata of a step, with the batch that the package's kernels attend to."""

    batch: DeviceBatch


class SurgeonGPUBackend(TritonAttentionBackend):
    """The backend that is registered and chosen as CUSTOM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM knows the backend."""
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages in which a head's tokens follow each other."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type["SurgeonGPUImpl"]:
        """The attention of one layer."""
        return SurgeonGPUImpl

    @staticmethod
    def get_builder_cls() -> type["SurgeonGPUBuilder"]:
        """The builder of a step's metadata."""
        return SurgeonGPUBuilder


class SurgeonGPUBuilder(TritonAttentionMetadataBuilder):
    """Binds the layers of a group to the kernels when the server starts, and builds each step's metadata.

    Raises:
        SurgeonError: the package cannot be used, or a layer that it covers is not what its kernels compute.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = serving(vllm_config)
        self.dense_from: torch.Tensor | None = None  # of each sequence, at an address that captured graphs keep
        if found is None:
            return
        self.asking = found.options.asking
        covered = covered_by(found, vllm_config, layer_names, kv_cache_spec, SurgeonGPUImpl)
        if covered is not None:
            found.package.prepare(device)  # before a graph is captured
            most = vllm_config.scheduler_config.max_num_seqs
            self.dense_from = torch.full((most,), NO_DENSE_ROWS, dtype=torch.int32, device=device)
            for name, layer in covered.layers.items():
                layer.impl.site = Site(covered.package, covered.indices[name])
        report(found, vllm_config, device.type)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """Builds a step's metadata, once for all layers of the group, without waiting for the device.

        Raises:
            PatchError: the step is not one of causal attention, or nobody says where its prompts end.
        """
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.dense_from is None:
            return built
        if common_attn_metadata.causal is not True or common_attn_metadata.mm_req_doc_ranges is not None:
            raise PatchError("vLLM's step", "causal attention", "another one", "serve this model without a package")
        sequences = len(common_attn_metadata.seq_lens)
        dense_from = self._dense_from(sequences)
        batch = DeviceBatch(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            dense_from,
            common_attn_metadata.block_table_tensor,
            self.block_size,
            common_attn_metadata.max_query_len,
        )
        known = {field.name: getattr(built, field.name) for field in fields(TritonAttentionMetadata)}
        return SurgeonGPUMetadata(**known, batch=batch)

    def _dense_from(self, sequences: int) -> torch.Tensor:
        """Writes the tokens after which the step's sequences read everything, which follow from their prompts."""
        assert self.dense_from is not None
        own = self.dense_from[:sequences]
        if not self.asking:
            return own
        prompts = prompt_lengths(sequences)
        if prompts is None:
            raise PatchError(
                "vLLM's step",
                "a model runner that tells the prompts' lengths",
                "another one",
                "serve without a package",
            )
        first = dense_from(prompts, self.asking)
        own.copy_(first.pin_memory() if own.is_cuda else first, non_blocking=True)
        return own


class SurgeonGPUImpl(TritonAttentionImpl):
    """The attention of one layer: on the package's kernels where the layer has a site, else vLLM's own."""

    site: Site | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:  # noqa: ARG002 - vLLM's signature
        """False: the kernels write the model's dtype."""
        return False

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
        if self.site is None or attn_metadata is None:  # the latter in a run that only measures memory
            rest = (attn_metadata, output, output_scale, output_block_scale)
            own: torch.Tensor = super().forward(layer, query, key, value, kv_cache, *rest)
            return own
        tokens, shape = attn_metadata.num_actual_tokens, (-1, self.num_heads, self.head_size)
        keys, values = kv_cache.split(self.head_size, dim=-1)
        self.site.package.kernels.run_pages(
            self.site.layer,
            attn_metadata.batch,
            query.view(shape)[:tokens],
            keys,
            values,
            self.scale,
            output.view(shape)[:tokens],
        )
        return output
