"""Servers that a package cannot serve are refused from their config alone, each fault in one line."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import Compiled, tiny_config
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TargetError
from surgeon.runtime.package.target import Target
from surgeon.runtime.vllm.compatibility import ANY_VERSION, check_server, check_version, covered_layers

CPU = Target.parse("cpu")


def server(**changes: Any) -> Any:
    """Stands for a VllmConfig; `changes` are of its parts, named `part__field`, or of the whole."""
    model = SimpleNamespace(hf_config=tiny_config(), dtype=torch.float32, max_model_len=512)
    cache = SimpleNamespace(cache_dtype="auto", block_size=64, user_specified_block_size=True)
    parallel = SimpleNamespace(
        tensor_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
    )
    whole = SimpleNamespace(
        model_config=model,
        cache_config=cache,
        parallel_config=parallel,
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(whole, f"{part}_config") if part else whole, field, value)
    return whole


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache__block_size": 16},
        {"cache__cache_dtype": "float32"},
        {"parallel__tensor_parallel_size": 2},
    ],
)
def test_what_fits_passes(compiled: dict[str, Compiled], changes: dict[str, Any]) -> None:
    check_server(server(**changes), compiled["sparse"].package, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hf_config": tiny_config(num_hidden_layers=2)}, "model.config.num_hidden_layers: expected 3"),
        ({"model__hf_config": tiny_config(attn_logit_softcapping=30.0)}, "attn_logit_softcapping: expected scores"),
        (
            {"model__hf_config": tiny_config(layer_types=["sliding_attention"] * 3)},
            "vLLM's model: expected full attention in one of the layers (0, 1, 2) that the package covers",
        ),
        (
            {"model__dtype": torch.bfloat16},
            "vLLM's dtype: expected that of the package's kernels, float32, got bfloat16",
        ),
        ({"cache__cache_dtype": "fp8"}, "keys and values in the model's dtype, got 'fp8'; leave out --kv-cache-dtype"),
        (
            {"cache__block_size": 24},
            "vLLM's pages: expected a multiple of 16 tokens, the package's block, got 24 tokens",
        ),
        ({"parallel__tensor_parallel_size": 4}, "expected a divisor of the model's 2 KV heads, got 4; use fewer ranks"),
        ({"parallel__decode_context_parallel_size": 2}, "vLLM's decode_context_parallel_size: expected 1"),
        ({"parallel__prefill_context_parallel_size": 2}, "vLLM's prefill_context_parallel_size: expected 1"),
        ({"parallel__use_ubatching": True}, "vLLM's micro-batches: expected none"),
        ({"speculative_config": object()}, "a server without speculative decoding, got one with it; leave out"),
        ({"kv_transfer_config": object()}, "a server without a KV connector"),
        ({"use_v2_model_runner": True}, "without model runner V2, got one with it; set VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_does_not_fit_is_refused(compiled: dict[str, Compiled], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError) as refused:
        check_server(server(**changes), compiled["sparse"].package, CPU)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


# On a GPU


GPU = Target.parse("cuda:90")


def gpu_package(compiled: dict[str, Compiled], phase: str = "paged_prefill", target: str = "cuda:90") -> Package:
    """The package, with an entry in its manifest of a kernel in fp16 beside those of the CPU."""
    package = load(compiled["sparse"].package._files.folder)
    entry = replace(package.manifest.kernels[0], target=target, dtype="fp16", phase=phase)
    package.manifest = replace(package.manifest, kernels=(*package.manifest.kernels, entry))
    return package


@pytest.mark.parametrize(
    "changes",
    [{}, {"cache__block_size": 16}, {"cache__block_size": 24, "cache__user_specified_block_size": False}],
)
def test_what_fits_a_gpu_passes(compiled: dict[str, Compiled], changes: dict[str, Any]) -> None:
    check_server(server(model__dtype=torch.float16, **changes), gpu_package(compiled), GPU)


def test_code_for_an_older_gpu_of_the_same_generation_serves(compiled: dict[str, Compiled]) -> None:
    check_server(server(model__dtype=torch.float16), gpu_package(compiled, target="cuda:80"), Target.parse("cuda:86"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dtype": torch.float32}, "vLLM's dtype: expected that of the package's kernels, float16, got float32"),
        ({"cache__cache_dtype": "fp8"}, "keys and values in the model's dtype, got 'fp8'; leave out --kv-cache-dtype"),
        (
            {"cache__block_size": 48},
            "a multiple of 16 tokens, the package's block and a power of two, got 48 tokens; serve with --block-size",
        ),
        ({"use_v2_model_runner": True}, "without model runner V2, got one with it; set VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_does_not_fit_a_gpu_is_refused(
    compiled: dict[str, Compiled], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchError) as refused:
        check_server(server(**({"model__dtype": torch.float16} | changes)), gpu_package(compiled), GPU)
    assert message in str(refused.value)


def test_a_package_without_kernels_for_pages_is_refused(compiled: dict[str, Compiled]) -> None:
    line = r"surgeon_package: expected kernels for keys and values in pages, got none for cuda:90; compile .* --paged"
    with pytest.raises(TargetError, match=line):
        check_server(server(model__dtype=torch.float16), gpu_package(compiled, phase="prefill"), GPU)


def test_routed_heads_on_a_gpu_are_refused(compiled: dict[str, Compiled]) -> None:
    package = gpu_package(compiled)
    package.manifest = replace(package.manifest, routed=(1,))
    with pytest.raises(
        PatchError, match=r"does not run these on GPUs yet, got routed heads in layer 1; serve on a CPU"
    ):
        check_server(server(model__dtype=torch.float16), package, GPU)


def test_a_package_for_another_gpu_is_refused(compiled: dict[str, Compiled]) -> None:
    with pytest.raises(TargetError, match=r"surgeon_package: expected kernels for cuda:100, .*--target cuda:100"):
        check_server(server(model__dtype=torch.float16), gpu_package(compiled), Target.parse("cuda:100"))


def test_requests_longer_than_the_topology_are_refused_where_the_topology_refuses_them(
    compiled: dict[str, Compiled],
) -> None:
    package = load(compiled["sparse"].package._files.folder)
    package.manifest = replace(package.manifest, beyond="error")
    check_server(server(model__max_model_len=64), package, CPU)
    with pytest.raises(PatchError, match=r"at most 64 tokens.*got 65 tokens; serve with --max-model-len 64"):
        check_server(server(model__max_model_len=65), package, CPU)


def test_layers_of_another_type_are_left(compiled: dict[str, Compiled]) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert covered_layers(tiny_config(layer_types=types), compiled["sparse"].package.manifest) == (1,)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5.post1", "0.32.0+cpu"])
def test_tested_versions_of_vllm_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_other_versions_of_vllm_are_refused_unless_asked_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ANY_VERSION, raising=False)
    with pytest.raises(PatchError, match=r"vLLM: expected version 0\.32 or newer, below 0\.33, got"):
        check_version(version)
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version(version)
