"""Tiny random models of the families that Surgeon supports, one for each trait that sets a family apart."""

import dataclasses
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from models import VOCABULARY
from surgeon.compiler.topology.topology import Topology

FULL, SLIDING = "full_attention", "sliding_attention"
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "phi3": (Phi3Config, {}),
    "phi3 partial rotary": (Phi3Config, {"partial_rotary_factor": 0.5}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 32,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 11,
            "layer_types": [FULL, SLIDING, FULL],
            "sliding_window": 24,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 32, "query_pre_attn_scalar": 11, "layer_types": [SLIDING, FULL, FULL], "sliding_window": 24},
    ),
    "granite": (
        GraniteConfig,
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    ),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", FULL, FULL], "block_auto_adjust_ff_dim": False}),
}
NAMES = tuple(_FAMILIES)
LEFT = {"qwen2 sliding": {2: SLIDING}, "gemma2": {1: SLIDING}, "gemma3": {0: SLIDING}, "lfm2": {0: "conv"}}
"""The layers of each family's model that are not full attention."""


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A family's model in fp32, with the shape of `models.SHAPE`, ready for inference."""
    kind, particulars = _FAMILIES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**(_SHAPE | particulars | changes)))
    return model.eval()


def of_family(topology: Topology, name: str) -> Topology:
    """The topology with a family's model type."""
    model = dataclasses.replace(topology.model, model_type=_FAMILIES[name][0].model_type)
    return dataclasses.replace(topology, model=model)
