"""The backend for GPUs as far as a machine without one can tell: what it says of itself, and each step's metadata."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="run make test-vllm")

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata, TritonAttentionMetadataBuilder

from no_waiting import NoWaiting
from surgeon.runtime.errors import PatchError
from surgeon.runtime.packed_batch import NO_DENSE_ROWS
from surgeon.runtime.vllm.gpu_backend import SurgeonGPUBackend, SurgeonGPUBuilder, SurgeonGPUImpl, SurgeonGPUMetadata
from surgeon.runtime.vllm.prompts import noting_prompts

PROMPTS = torch.tensor([300, 40, 7], dtype=torch.int32)


def test_vllm_knows_it_as_custom() -> None:
    assert AttentionBackendEnum[SurgeonGPUBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert SurgeonGPUBackend.get_impl_cls() is SurgeonGPUImpl
    assert SurgeonGPUBackend.get_builder_cls() is SurgeonGPUBuilder


def test_graphs_may_capture_steps_of_one_token_a_sequence() -> None:
    assert SurgeonGPUBuilder._cudagraph_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"dtype": torch.float16, "kv_cache_dtype": "float16"}, []),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"kv_cache_dtype": "int8_per_token_head"}, ["kv_cache_dtype not supported"]),
        ({"dtype": torch.float32}, ["dtype not supported"]),
    ],
)
def test_what_it_takes(changes: dict[str, Any], reasons: list[str]) -> None:
    config = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 64,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
    }
    assert SurgeonGPUBackend.validate_configuration(**(config | changes)) == reasons


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> SurgeonGPUBuilder:
    """A builder of a group of layers that run on a package's kernels, with 100 tokens that ask."""
    names = [field.name for field in fields(TritonAttentionMetadata)]
    monkeypatch.setattr(
        TritonAttentionMetadataBuilder,
        "build",
        lambda _builder, _prefix, common, _fast=False: TritonAttentionMetadata(
            **{name: getattr(common, name, None) for name in names}
        ),
    )
    made = SurgeonGPUBuilder.__new__(SurgeonGPUBuilder)
    made.dense_from = torch.full((8,), NO_DENSE_ROWS, dtype=torch.int32)
    made.asking, made.block_size = 100, 64
    return made


def step(**changes: Any) -> Any:
    """Stands for vLLM's metadata of a step: a chunk, a token and a whole prompt."""
    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 20, 21, 28], dtype=torch.int32),
        seq_lens=torch.tensor([220, 50, 7], dtype=torch.int32),
        block_table_tensor=torch.zeros((3, 16), dtype=torch.int32),
        max_query_len=20,
        num_actual_tokens=28,
        causal=True,
        mm_req_doc_ranges=None,
    )
    vars(common).update(changes)
    return common


def built(builder: SurgeonGPUBuilder, common: Any) -> Any:
    """The metadata of a step in a runner that tells its prompts."""
    runner = SimpleNamespace(input_batch=SimpleNamespace(num_prompt_tokens_cpu_tensor=PROMPTS))
    return noting_prompts(lambda _runner: builder.build(0, common))(runner)


def test_a_step_is_described_by_the_tensors_of_the_device(builder: SurgeonGPUBuilder) -> None:
    common = step()
    with NoWaiting():
        made = built(builder, common)
    assert isinstance(made, SurgeonGPUMetadata)
    assert made.num_actual_tokens == 28
    assert made.batch.query_start is common.query_start_loc
    assert made.batch.lengths is common.seq_lens
    assert made.batch.block_table is common.block_table_tensor
    assert (made.batch.page_tokens, made.batch.most_queries) == (64, 20)
    assert made.batch.dense_from.tolist() == [200, -60, -93]


def test_dense_rows_lie_at_an_address_that_stays(builder: SurgeonGPUBuilder) -> None:
    first, second = (built(builder, step()).batch.dense_from for _ in range(2))
    assert first.data_ptr() == second.data_ptr() == builder.dense_from.data_ptr()


def test_by_the_pattern_alone_no_prompt_matters(builder: SurgeonGPUBuilder) -> None:
    builder.asking = 0
    assert builder.build(0, step()).batch.dense_from.tolist() == [NO_DENSE_ROWS] * 3


def test_layers_without_kernels_have_vllms_metadata(builder: SurgeonGPUBuilder) -> None:
    builder.dense_from = None
    assert type(builder.build(0, step())) is TritonAttentionMetadata


@pytest.mark.parametrize(
    "changes", [{"causal": False}, {"causal": torch.ones(3)}, {"mm_req_doc_ranges": {0: [(1, 2)]}}]
)
def test_attention_that_looks_ahead_is_refused(builder: SurgeonGPUBuilder, changes: dict[str, Any]) -> None:
    with pytest.raises(PatchError, match="vLLM's step: expected causal attention, got another one"):
        built(builder, step(**changes))


def test_a_runner_that_tells_no_prompts_is_refused(builder: SurgeonGPUBuilder) -> None:
    with pytest.raises(PatchError, match="vLLM's step: expected a model runner that tells the prompts' lengths"):
        builder.build(0, step())


class Kernels:
    """Stands for a package's kernels, and keeps what they are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run_pages(self, *given: Any) -> None:
        self.calls.append(given)
        given[-1].fill_(1.0)


def test_a_layer_hands_its_pages_over_as_they_are(builder: SurgeonGPUBuilder) -> None:
    impl, kernels = SurgeonGPUImpl.__new__(SurgeonGPUImpl), Kernels()
    impl.num_heads, impl.head_size, impl.scale = 4, 16, 0.25
    impl.site = SimpleNamespace(package=SimpleNamespace(kernels=kernels), layer=3)
    metadata = built(builder, step())
    query, output = torch.zeros(32, 4, 16), torch.zeros(32, 64)
    cache = torch.zeros(9, 2, 64, 32)
    impl.forward(None, query, query, query, cache, metadata, output)
    ((layer, batch, q, k, v, scale, out),) = kernels.calls
    assert (layer, batch, scale) == (3, metadata.batch, 0.25)
    assert q.shape == out.shape == (28, 4, 16)
    assert k.shape == v.shape == (9, 2, 64, 16)
    assert (k.data_ptr(), v.data_ptr() - k.data_ptr()) == (cache.data_ptr(), 16 * cache.element_size())
    assert output[:28].all()
    assert not output[28:].any()
