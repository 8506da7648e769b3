"""A model's last hidden states, and the logits that its own forward pass computes from them."""

from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.runtime.errors import ModelError
from surgeon.runtime.transformers.offload import entry_device


def hidden_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The last hidden states `[length, hidden_size]` of one sequence `[1, length]`.

    Raises:
        ModelError: the model computes its logits from them in another way than `logits_of`.
    """
    states, _ = _read(model, tokens, {"use_cache": False})
    return states


def continued_states(model: PreTrainedModel, tokens: torch.Tensor, prompt: int, step: int) -> torch.Tensor:
    """The last hidden states `[length - 1, hidden_size]` of all but the last token of `[1, length]`, with a cache.

    The first `prompt` tokens are read in one call, the others `step` at a time.

    Raises:
        ModelError: as in `hidden_states`.
    """
    states, cache = _read(model, tokens[:, :prompt], {"use_cache": True})
    parts = [states]
    for begin in range(prompt, tokens.shape[1] - 1, step):
        part = tokens[:, begin : min(begin + step, tokens.shape[1] - 1)]
        states, cache = _read(model, part, {"use_cache": True, "past_key_values": cache})
        parts.append(states)
    return torch.cat(parts)


def _read(model: PreTrainedModel, tokens: torch.Tensor, cached: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The last hidden states of the tokens of one call, and the cache after it."""
    kept: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0]))
    try:
        output = model(input_ids=tokens.to(entry_device(model)), logits_to_keep=1, **cached)
    finally:
        hook.remove()
    states: torch.Tensor = kept[0][0]
    last = logits_of(model, states[-1:])
    if not torch.allclose(last, output.logits[0].to(last), rtol=0.05, atol=0.05):
        raise ModelError(
            type(model).__name__,
            "logits that are the output embedding of the last hidden state, scaled or capped as the config says",
            "others",
            "this model cannot be evaluated or learned on",
        )
    return states, output.past_key_values if cached["use_cache"] else None


def logits_of(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits `[positions, vocabulary]`, in fp32 or wider, of hidden states `[positions, hidden_size]`."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    logits: torch.Tensor = head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
