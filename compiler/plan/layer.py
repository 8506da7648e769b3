"""One layer of a model's shape, with random weights, made from the model's config alone."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgeon.compiler.learn.measure.before_weights import read_without_weights
from surgeon.compiler.learn.measure.checkpoint import check_decoder


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for: its name, its config, and the number of its parameters."""

    name: str
    config: PreTrainedConfig
    parameters: int


def read_planned(name: str) -> PlannedModel:
    """Reads a model's config; `name` is a folder, a GGUF file, or a name that Transformers can resolve.

    Raises:
        ModelError: it cannot be read, or is not a decoder that a topology can describe.
    """
    model = read_without_weights(name)
    check_decoder(model)
    return PlannedModel(Path(name).absolute().name, model.config, model.num_parameters())


def one_layer(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with its first layer alone, in fp32, with the embedding for a head: one table instead of two."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = 1
    shorter.tie_word_embeddings = True
    if types := getattr(shorter, "layer_types", None):
        shorter.layer_types = types[:1]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shorter, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model
