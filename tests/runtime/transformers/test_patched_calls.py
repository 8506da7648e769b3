"""Calls that a patched model cannot serve are refused, never computed as something else."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from models import Compiled, tiny_config, tiny_llama, tokens
from surgeon.runtime import patch
from surgeon.runtime.errors import PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def patched(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    patch(model, compiled["dense"].package, recall="pattern")
    return model


def mask_without(*holes: int, length: int = 20) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, list(holes)] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attention_mask": mask_without(7)},
            r"attention_mask\[1\]: .* got masked keys between valid ones; pad on the left",
        ),
        ({"attention_mask": mask_without(0, 7)}, "got masked keys between valid ones"),
        ({"attention_mask": mask_without(length=19)}, r"expected shape \[2, 20\].*got shape \[2, 19\]"),
        ({"attention_mask": mask_without()[:1]}, r"expected shape \[2, 20\].*got shape \[1, 20\]"),
        ({"attention_mask": mask_without(length=30)}, "attention_mask: expected at most 20 keys, as there are, got 30"),
        (
            {"attention_mask": mask_without(length=30), "use_cache": False},
            "attention_mask: expected 20 keys, as the layer has, got 30; pass the cache",
        ),
        ({"attention_mask": mask_without()[:, None]}, r"expected two dimensions \[batch, keys\], got 3 dimensions"),
        ({"attention_mask": torch.zeros(2, 1, 20, 20)}, r"got a mask of its own: torch.float32 \[2, 1, 20, 20\]"),
        ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)}, "got a mask of its own: torch.bool"),
        (
            {"position_ids": torch.arange(20).remainder(10).expand(2, -1), "use_cache": False},
            "mask: expected plain causal attention, got and_masks.*: sliding, packed",
        ),
        (
            {"output_attentions": True},
            "attention of layer 0: expected plain causal attention, got output_attentions=True",
        ),
        ({"sliding_window": 8}, "got sliding_window=8; call the model without sliding_window"),
        ({"softcap": 30.0}, "got softcap=30.0"),
        ({"s_aux": torch.zeros(4)}, "got s_aux=tensor"),
        ({"position_bias": torch.zeros(1, 4, 20, 20)}, "got position_bias=tensor"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, "got cu_seq_lens_q=tensor"),
    ],
)
def test_a_call_is_refused(patched: LlamaForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        patched(tokens(2, 20), **arguments)


def test_dropout_is_refused(compiled: dict[str, Compiled]) -> None:
    model = tiny_llama(tiny_config(attention_dropout=0.1))
    patch(model, compiled["dense"].package, recall="pattern")
    model(tokens(1, 8))
    with pytest.raises(
        PatchError, match=r"attention of layer 0: expected no dropout, got dropout 0.1; call model.eval"
    ):
        model.train()(tokens(1, 8))


def test_decoding_after_right_padding_is_refused(patched: LlamaForCausalLM) -> None:
    mask = mask_without(18, 19)
    cache = patched(tokens(2, 20), attention_mask=mask).past_key_values
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), dim=1)
    with pytest.raises(PatchError, match="masked keys between valid ones"):
        patched(tokens(2, 1), attention_mask=longer, past_key_values=cache)


def test_a_mask_of_new_tokens_only_is_refused(patched: LlamaForCausalLM) -> None:
    cache = patched(tokens(2, 20)).past_key_values
    with pytest.raises(PatchError, match=r"expected shape \[2, 23\].*got shape \[2, 3\]"):
        patched(tokens(2, 3), attention_mask=torch.ones(2, 3), past_key_values=cache)


def test_a_layer_without_its_mask_is_refused(patched: LlamaForCausalLM) -> None:
    hidden = torch.zeros(1, 4, 64)
    rotary = patched.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(PatchError, match="got None; call the model, not one of its layers"):
        patched.model.layers[0](hidden, position_embeddings=rotary)


def test_a_layer_that_is_not_causal_is_refused(patched: LlamaForCausalLM) -> None:
    hidden = torch.zeros(1, 4, 64)
    arguments: dict[str, Any] = {
        "position_embeddings": patched.model.rotary_emb(hidden, torch.arange(4)[None]),
        "attention_mask": create_causal_mask(patched.config, hidden, attention_mask=None, past_key_values=None),
    }
    layer = patched.model.layers[0]
    layer(hidden, **arguments)
    with pytest.raises(PatchError, match="attention of layer 0: expected causal attention, got is_causal=False"):
        layer(hidden, is_causal=False, **arguments)


def test_a_bidirectional_call_is_refused(patched: LlamaForCausalLM) -> None:
    patched.config.is_causal = False
    with pytest.raises(PatchError, match="mask: expected plain causal attention, got bidirectional_mask_function"):
        patched(tokens(1, 8))


def test_an_overlaid_mask_is_refused(patched: LlamaForCausalLM) -> None:
    with pytest.raises(PatchError, match="mask: expected plain causal attention, got or_masks"):
        create_causal_mask(
            config=patched.config,
            inputs_embeds=torch.zeros(1, 4, 64),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda *_: True,
        )


def test_a_sliding_cache_is_refused(patched: LlamaForCausalLM) -> None:
    config = LlamaConfig(**(tiny_config().to_dict() | {"sliding_window": 8}))
    cache = DynamicCache(config=config)
    patched(tokens(1, 12), past_key_values=cache)
    with pytest.raises(PatchError, match="past_key_values: expected a cache that holds every token since the first"):
        patched(tokens(1, 1), past_key_values=cache)
