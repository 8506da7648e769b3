"""A model that a package does not fit is refused before anything is changed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from gpu_standin import on_gpu
from models import Compiled, attributes, tiny_config, tiny_llama, tokens
from surgeon.runtime import Package, fingerprint, patch, unpatch, weights_id
from surgeon.runtime.errors import PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")


def with_shape(package: Package, **changes: Any) -> Package:
    """The package as if compiled for another model."""
    other = Package(package._files, package.kernels)
    shape = dataclasses.replace(package.manifest.model, **changes)
    other.manifest = dataclasses.replace(package.manifest, model=shape)
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen2"},
            "model.config.model_type: expected 'qwen2', as the package was compiled for, got 'llama'",
        ),
        ({"num_hidden_layers": 30}, "model.config.num_hidden_layers: expected 30, .* got 3"),
        ({"num_attention_heads": 9}, "model.config.num_attention_heads: expected 9, .* got 4"),
        ({"num_key_value_heads": 1}, "model.config.num_key_value_heads: expected 1, .* got 2"),
        ({"head_dim": 64}, "model.config.head_dim: expected 64, .* got 32"),
        (
            {"weights_sha256": "0" * 64},
            "weights: expected those that the topology was learned on, SHA-256 0+, got [0-9a-f]{64}",
        ),
    ],
)
def test_another_model_is_refused(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], changes: dict[str, Any], message: str
) -> None:
    before = attributes(model)
    with pytest.raises(PatchError, match=message):
        patch(model, with_shape(compiled["dense"].package, **changes), recall="pattern")
    assert attributes(model) == before


@pytest.mark.parametrize(("identity", "factor"), [(weights_id, -1.0), (fingerprint, 1.001)])
def test_the_weights_it_was_learned_on_are_taken(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], identity: Callable[[LlamaForCausalLM], str], factor: float
) -> None:
    package = with_shape(compiled["dense"].package, weights_sha256=identity(model))
    patch(model, package, recall="pattern")
    unpatch(model)
    with pytest.raises(PatchError, match="weights: expected those that the topology was learned on"):
        patch(tiny_llama(seed=5), package)
    model.model.norm.weight[3] *= factor
    with pytest.raises(PatchError, match="weights: expected those that the topology was learned on"):
        patch(model, package, recall="pattern")


def test_the_weights_it_was_learned_on_are_taken_in_another_dtype_and_with_adapters(
    model: LlamaForCausalLM, compiled: dict[str, Compiled]
) -> None:
    peft = pytest.importorskip("peft")
    package = with_shape(compiled["dense"].package, weights_sha256=weights_id(model))
    model.to(torch.bfloat16).float().add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    patch(model, package)
    unpatch(model)


def sliding(model: LlamaForCausalLM) -> None:
    model.config.sliding_window = 32


def layer_types(model: LlamaForCausalLM) -> None:
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]


def softcap(model: LlamaForCausalLM) -> None:
    model.config.attn_logit_softcapping = 30.0


def bidirectional(model: LlamaForCausalLM) -> None:
    model.config.is_causal = False


def attentions(model: LlamaForCausalLM) -> None:
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True


def bidirectional_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.is_causal = False


def sliding_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.sliding_window = 32


def sinks(model: LlamaForCausalLM) -> None:
    model.model.layers[2].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))


def other_heads(model: LlamaForCausalLM) -> None:
    model.model.layers[0].self_attn.v_head_dim = 16


def foreign_config(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.config = tiny_config()


def missing_layer(model: LlamaForCausalLM) -> None:
    del model.model.layers[2]


def double(model: LlamaForCausalLM) -> None:
    model.double()


def half(model: LlamaForCausalLM) -> None:
    model.half()


def meta(model: LlamaForCausalLM) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sliding, "LlamaForCausalLM: expected full attention in one of the layers .*, got sliding_attention; learn"),
        (layer_types, r"layers.1.self_attn.sliding_window: expected the window of .* 'sliding_attention', got none"),
        (softcap, "model.config.attn_logit_softcapping: expected scores that enter .* unchanged, .*, got 30.0"),
        (bidirectional, "model.config: expected causal attention, got bidirectional"),
        (attentions, "model.config.output_attentions: expected False.*, got True"),
        (bidirectional_layer, r"model.layers.1.self_attn.is_causal: expected True, got False"),
        (sliding_layer, r"model.layers.1.self_attn.sliding_window: .* got 32"),
        (sinks, r"model.layers.2.self_attn.sinks: expected full causal attention"),
        (other_heads, r"model.layers.0.self_attn.v_head_dim: expected 32, .*, got 16"),
        (foreign_config, r"model.layers.1.self_attn.config: expected the model's own config, got another object"),
        (
            missing_layer,
            r"expected one attention module for each of the layers \[0, 1, 2\], .*, got those of the layers \[0, 1\]",
        ),
        (double, r"q_proj: expected queries, keys and values in torch.float32, as .* kernels, got torch.float64; load"),
        (
            half,
            "q_proj: expected queries, keys and values in torch.float32, .*, got torch.float16; .* --dtype fp16",
        ),
        (meta, "expected weights on the CPU or a GPU, got meta"),
    ],
)
def test_a_model_that_does_more_is_refused(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], change: Callable[[LlamaForCausalLM], None], message: str
) -> None:
    change(model)
    before = attributes(model)
    with pytest.raises(PatchError, match=message):
        patch(model, compiled["dense"].package, recall="pattern")
    assert attributes(model) == before


def test_what_is_no_model_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    wrapper: Any = torch.nn.Sequential(model)
    with pytest.raises(PatchError, match="Sequential: expected a PreTrainedModel of Transformers"):
        patch(wrapper, compiled["dense"].package, recall="pattern")


def test_an_attention_of_its_own_is_refused(compiled: dict[str, Compiled]) -> None:
    class Handmade(LlamaForCausalLM):
        _supports_attention_backend = False

    with pytest.raises(PatchError, match="Handmade: expected a model whose attention goes through"):
        patch(Handmade(tiny_config()), compiled["dense"].package, recall="pattern")


def test_patching_twice_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(model, compiled["dense"].package, recall="pattern")
    with pytest.raises(PatchError, match=r"LlamaForCausalLM: expected a model that is not patched.*unpatch\(model\)"):
        patch(model, compiled["sparse"].package, recall="pattern")
    unpatch(model)
    patch(model.model, compiled["dense"].package, recall="pattern")
    with pytest.raises(PatchError, match="model: expected a model that is not patched"):
        patch(model, compiled["sparse"].package, recall="pattern")


def test_unpatching_an_unpatched_model_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    with pytest.raises(PatchError, match="LlamaForCausalLM: expected a patched model, got one that is not"):
        unpatch(model)
    patch(model, compiled["dense"].package, recall="pattern")
    unpatch(model)
    with pytest.raises(PatchError, match="expected a patched model"):
        unpatch(model)


def test_choosing_the_attention_by_name_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(tiny_llama(), compiled["dense"].package, recall="pattern")
    model.set_attn_implementation("surgeon")
    with pytest.raises(
        PatchError, match=r"LlamaAttention: expected .* bound to a kernel package.*surgeon.runtime.patch"
    ):
        model(tokens(1, 4))


def test_a_model_on_a_gpu_that_the_package_has_no_kernels_for(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = torch.nn.Parameter(on_gpu(attention.q_proj.weight.data), requires_grad=False)
    message = r"layers.1.self_attn on cuda:0: expected kernels for cuda:90, this device's target, got only cpu; move"
    with pytest.raises(PatchError, match=message):
        patch(model, compiled["dense"].package, recall="pattern")
