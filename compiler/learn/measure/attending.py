"""A frozen decoder whose attention is a function of the caller's, for the time of a measurement.

Source: Transformers' AttentionInterface and AttentionMaskInterface, and what attention modules hand to them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from surgeon.runtime.transformers.layers import find_attention
from surgeon.runtime.transformers.offload import entry_device, is_offloaded

KEPT_BYTES = 4 * 2**30
"""The activations that a backward pass may keep; where there would be more, layers are computed again."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Causal attention of a layer: `attend(layer, q, k, v, scale)`.

q and what it returns are `[1, heads, length, head_dim]`, k and v `[1, KV heads, length, head_dim]`. It may be called
again for a layer during the backward pass (`bounded`).
"""

_IMPLEMENTATION = "surgeon_learning"
_ATTRIBUTE = "_surgeon_learning"


@contextmanager
def attending(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Lets every attention of the model call `attend`; sequences are unpadded."""
    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
    modules = [module for _, module in find_attention(model)]
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = _IMPLEMENTATION
        for layer, module in enumerate(modules):
            setattr(module, _ATTRIBUTE, partial(attend, layer))
        yield
    finally:
        model.config._attn_implementation = before
        for module in modules:
            if hasattr(module, _ATTRIBUTE):
                delattr(module, _ATTRIBUTE)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of `[1, heads, length, head_dim]` to fewer or as many KV heads."""
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def last_states(
    model: PreTrainedModel, tokens: torch.Tensor, differentiable: bool = False, start: int = 0
) -> torch.Tensor:
    """The last hidden states `[length, hidden_size]` of one sequence `[1, length]`, the first token at place `start`.

    They can be differentiated with respect to what `attend` adds, and without that to the embedded tokens if
    `differentiable`: the weights are frozen.
    """
    embedded = model.get_input_embeddings()(tokens.to(entry_device(model)))
    if differentiable:
        embedded = embedded.detach().requires_grad_()
    places = torch.arange(start, start + tokens.shape[1], device=embedded.device)[None]
    read = model.base_model(inputs_embeds=embedded, position_ids=places, use_cache=False)
    states: torch.Tensor = read.last_hidden_state[0]
    return states


def activation_bytes(config: PreTrainedConfig, length: int) -> int:
    """The activations, about, that a backward pass through all layers keeps for one sequence."""
    widths = 10 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return int(config.num_hidden_layers * length * widths * 4)


@contextmanager
def bounded(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass and recomputes the rest, if keeping everything is costly."""
    offloaded = is_offloaded(model)  # all of its weights would be kept too
    if activation_bytes(model.config, length) <= KEPT_BYTES and not offloaded:
        yield
        return
    layers = [model.get_submodule(name.rpartition(".")[0]) for name, _ in find_attention(model)]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            # Stopping early would leave behind the weights that were fetched.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, early_stop=not offloaded)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _no_mask(**_arguments: Any) -> None:
    """Returns no mask: attention is causal by itself."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: None,
    scaling: float | None = None,
    **_extras: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output = getattr(module, _ATTRIBUTE)(query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None
