"""A model before its weights are read, known by its config or its GGUF header, so that it can be refused early."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from surgeon.compiler.learn.measure.checkpoint import check_placement, located, unreadable
from surgeon.compiler.learn.measure.checkpoint_files import DeviceMap, check_devices, check_files
from surgeon.compiler.system.terminal import say


@dataclass(frozen=True)
class Outline:
    """A model without its weights, on the meta device, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int | None:
        """The longest sequence that the model is made for, in tokens; None if its config does not say."""
        longest: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest

    def warn_beyond_context(self, length: int, option: str) -> None:
        """Says in a line that a length, which an option gave, is beyond the model's context."""
        if self.context is not None and length > self.context:
            say(
                f"warning: {option}: {length:,} tokens are beyond the model's context of {self.context:,} "
                "(max_position_embeddings), where models write badly, dense or not"
            )


def read_outline(name: str, device_map: DeviceMap | None = None) -> Outline:
    """Reads a model's config and tokenizer, and makes the model without weights; arguments as in `read_checkpoint`.

    Of a GGUF file this reads the header alone, and nothing is dequantised.

    Raises:
        ModelError: it cannot be read or could not be placed as requested, or is not a causal language model.
    """
    check_placement(device_map)
    where, options = located(name)
    check_devices(device_map)
    model = read_without_weights(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        raise unreadable(name, error) from None
    return Outline(model, tokenizer)


def read_without_weights(name: str) -> PreTrainedModel:
    """Reads a model's config alone, and makes the model on the meta device, where its weights take no memory.

    Raises:
        ModelError: it cannot be read, or is not a causal language model.
    """
    where, options = located(name)
    check_files(Path(name))
    try:
        config = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise unreadable(name, error) from None
    return model
