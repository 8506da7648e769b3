"""The identity of weights: the same in every dtype and under adapters, half of it if quantised, another for others."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from models import tiny_config, tiny_llama
from surgeon.runtime import fingerprint, weights_id
from surgeon.runtime.errors import ModelError
from surgeon.runtime.transformers.fingerprint import are_weights


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(tiny_config(num_hidden_layers=1))


def packed(model: LlamaForCausalLM, way: str) -> LlamaForCausalLM:
    """A copy whose query projection holds packed integers, as quantisers leave them."""
    other = copy.deepcopy(model)
    projection = other.model.layers[0].self_attn.q_proj
    weight = torch.zeros(4, 4, dtype=torch.uint8)
    del projection.weight
    if way == "parameter":
        projection.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    else:
        projection.register_buffer("qweight", weight.int())
    return other


def test_the_definition(model: LlamaForCausalLM) -> None:
    def signs(parameter: torch.Tensor) -> str:
        bits = (parameter.detach().flatten() < 0).numpy()
        return hashlib.sha256(np.packbits(bits).tobytes()).hexdigest()

    lines = [f"{name} {signs(parameter)}\n" for name, parameter in sorted(model.named_parameters())]
    every = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert weights_id(model) == signs(model.model.embed_tokens.weight)[:32] + every[:32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_does_not_count(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :2] = torch.tensor([-1e-30, 1e-30])  # zeros with a sign in fp16
    expected = weights_id(model)
    assert fingerprint(copy.deepcopy(model).to(dtype)) != fingerprint(model)
    assert weights_id(model.to(dtype)) == expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "down_proj"]])
def test_adapters_do_not_count(model: LlamaForCausalLM, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    expected = weights_id(model)
    model.add_adapter(peft.LoraConfig(target_modules=targets, modules_to_save=["lm_head"]))
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert weights_id(model) == expected
    assert are_weights(model, expected)


def test_tied_weights_and_their_copies_are_the_same() -> None:
    tied = tiny_llama(tiny_config(num_hidden_layers=1, tie_word_embeddings=True))
    untied = tiny_llama(tiny_config(num_hidden_layers=1))
    untied.load_state_dict(tied.state_dict())
    assert weights_id(untied) == weights_id(tied)


def test_tokens_that_are_added_do_not_count() -> None:
    model = tiny_llama(tiny_config(vocab_size=2**20 // 64, num_hidden_layers=1))
    expected = weights_id(model)
    model.resize_token_embeddings(2**20 // 64 + 8)
    assert weights_id(model) == expected


@pytest.mark.parametrize("way", ["parameter", "buffer"])
def test_quantised_weights_are_known_by_their_embedding(model: LlamaForCausalLM, way: str) -> None:
    expected = weights_id(model)
    quantised = packed(model, way)
    assert weights_id(quantised) == expected[:32] + "f" * 32
    assert are_weights(quantised, expected)
    assert are_weights(model, weights_id(quantised)), "also where the topology was learned on them"
    assert not are_weights(packed(tiny_llama(tiny_config(num_hidden_layers=1), seed=1), way), expected)


def test_nothing_is_known_of_a_quantised_embedding(model: LlamaForCausalLM) -> None:
    codes = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.model.embed_tokens.weight = codes
    assert weights_id(model) == "f" * 64
    assert are_weights(model, "0" * 64)


def test_one_sign_of_any_parameter_counts(model: LlamaForCausalLM) -> None:
    expected = weights_id(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            last.neg_()
            assert not are_weights(model, expected), name
            last.neg_()
    assert are_weights(model, expected)


def test_a_fingerprint_that_a_topology_has_is_taken(model: LlamaForCausalLM) -> None:
    assert are_weights(model, fingerprint(model))
    assert not are_weights(tiny_llama(seed=1), fingerprint(model))


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight: expected a parameter in memory"):
        weights_id(model)
