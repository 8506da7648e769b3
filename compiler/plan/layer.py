"""One layer of a model's shape, with random weights, made from the model's config alone."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgeon.compiler.learn.measure.checkpoint import check_decoder
from surgeon.runtime.errors import ModelError, short_repr
from surgeon.runtime.installation import required


@dataclass(frozen=True)
class Outline:
    """A model without its weights: its config, and the number of its parameters."""

    name: str
    config: PreTrainedConfig
    parameters: int


def read_outline(name: str) -> Outline:
    """Reads a model's config; `name` is a folder, a GGUF file, or a name that Transformers can resolve.

    Raises:
        ModelError: it cannot be read, or is not a decoder that a topology can describe.
    """
    where: str | Path = name
    options: dict[str, Any] = {}
    if Path(name).suffix.lower() == ".gguf":
        required("gguf", ModelError, name)
        where, options = Path(name).parent, {"gguf_file": Path(name).name}
    try:
        config = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"):  # all of the model's modules, and none of its memory
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a stranger's file: whatever Transformers raises, it is the file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            name, "the config of a causal language model", short_repr(reason, 200), "check the path or the name"
        ) from None
    check_decoder(model)
    return Outline(Path(name).absolute().name, config, model.num_parameters())


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
