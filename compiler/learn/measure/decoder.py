"""A frozen decoder run under a pattern of blocks, with an observer at every attention.

Source: Transformers' AttentionInterface and AttentionMaskInterface, and what attention modules hand to them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from surgeon.compiler.learn.measure.attention import block_sparse_attention, masked_attention
from surgeon.runtime.evaluate.logits import hidden_states, logits_of
from surgeon.runtime.transformers.layers import find_attention
from surgeon.runtime.transformers.offload import entry_device, is_offloaded

_IMPLEMENTATION = "surgeon_learning"
_ATTRIBUTE = "_surgeon_learning"
LOGITS_CHUNK = 512
"""The positions whose logits are computed at a time."""
KEPT_BYTES = 4 * 2**30
"""The activations that a backward pass may keep; where there would be more, layers are computed again."""


@dataclass(frozen=True)
class Observation:
    """One layer's attention on one sequence, and the gradient that tells how much its output matters.

    `q`, `output` and `gradient` (of the loss with respect to the output) are `[heads, length, head_dim]`, `k` and `v`
    `[KV heads, length, head_dim]`; all are detached.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    gradient: torch.Tensor
    scale: float


Observer = Callable[[Observation], None]


@dataclass(frozen=True)
class _Task:
    layer: int
    visible: torch.Tensor | None
    observe: Observer | None
    observe_keys: Callable[[int, torch.Tensor], None] | None


def dense_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The dense model's last hidden states of one sequence `[1, length]`: `[length, hidden]`, on the CPU.

    Raises:
        ModelError: the model computes its logits from them in an unknown way.
    """
    with torch.inference_mode(), _attending(model, None, None):
        return hidden_states(model, tokens).clone().cpu()


def sparse_divergence(
    model: PreTrainedModel, tokens: torch.Tensor, dense: torch.Tensor, visible: Sequence[torch.Tensor], scored: int = 0
) -> float:
    """Mean KL divergence, in nats per token, of the dense model's next-token distribution from the pattern's.

    `dense` holds the dense model's last hidden states; `visible` holds bool `[heads, blocks, blocks]` for each layer.
    Only the last `scored` tokens count; all do if it is 0.
    """
    with torch.inference_mode(), _attending(model, visible, None):
        counted = _states(model, tokens)[-scored:]
        return _divergence(model, dense[-scored:], counted)[0] / len(counted)


def observe_dense(
    model: PreTrainedModel, tokens: torch.Tensor, generator: torch.Generator, observe: Observer, scored: int = 0
) -> torch.Tensor:
    """Calls `observe` for each layer, last layer first, with gradients of the log-likelihood of sampled next tokens.

    The next tokens are drawn from the model's own distribution, so that the mean outer product of these gradients is
    the Fisher information. Only those after the last `scored` tokens are drawn; all are if it is 0. Returns the last
    hidden states.
    """
    with _attending(model, None, observe), _bounded(model, tokens.shape[1]):
        states = _states(model, tokens, differentiable=True)
        counted = states[-scored:]
        counted.backward(_sampled_gradient(model, counted.detach(), generator))
    return states.detach()


def observe_sparse(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    dense: torch.Tensor,
    visible: Sequence[torch.Tensor],
    observe: Observer,
    scored: int = 0,
) -> float:
    """Calls `observe` for each layer, last layer first, with gradients of the divergence summed over the scored tokens.

    Returns the mean divergence; arguments as for `sparse_divergence`.
    """
    with _attending(model, visible, observe), _bounded(model, tokens.shape[1]):
        states = _states(model, tokens, differentiable=True)
        counted = states[-scored:]
        total, gradient = _divergence(model, dense[-scored:], counted.detach(), differentiate=True)
        counted.backward(gradient)
    return total / len(counted)


def observe_keys(model: PreTrainedModel, tokens: torch.Tensor, observe: Callable[[int, torch.Tensor], None]) -> None:
    """Calls `observe(layer, keys)` for each layer of the dense model, with keys `[KV heads, length, head_dim]`."""
    with torch.inference_mode(), _attending(model, None, None, observe):
        _states(model, tokens)


def pull_masks(
    model: PreTrainedModel, tokens: torch.Tensor, dense: torch.Tensor, masks: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The mean divergence and its gradient with respect to the masks.

    `masks` holds numbers from 0 to 1, `[layers, heads, blocks, blocks]`; otherwise as for `sparse_divergence`.
    """
    varied = masks.detach().requires_grad_()
    with _attending(model, varied.unbind(), None), _bounded(model, tokens.shape[1]):
        states = _states(model, tokens)
        total, gradient = _divergence(model, dense, states.detach(), differentiate=True)
        (pull,) = torch.autograd.grad(states, varied, gradient / tokens.shape[1])
    return total / tokens.shape[1], pull


def activation_bytes(config: PreTrainedConfig, length: int) -> int:
    """The activations, about, that a backward pass through all layers keeps for one sequence."""
    widths = 10 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return int(config.num_hidden_layers * length * widths * 4)


def _states(model: PreTrainedModel, tokens: torch.Tensor, differentiable: bool = False) -> torch.Tensor:
    embedded = model.get_input_embeddings()(tokens.to(entry_device(model)))
    if differentiable:  # the weights are frozen, so gradients start at the embedded tokens
        embedded = embedded.detach().requires_grad_()
    states: torch.Tensor = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    return states


@contextmanager
def _attending(
    model: PreTrainedModel,
    visible: Sequence[torch.Tensor] | None,
    observe: Observer | None,
    observe_keys: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
    modules = [module for _, module in find_attention(model)]
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = _IMPLEMENTATION
        for layer, module in enumerate(modules):
            setattr(
                module, _ATTRIBUTE, _Task(layer, None if visible is None else visible[layer], observe, observe_keys)
            )
        yield
    finally:
        model.config._attn_implementation = before
        for module in modules:
            if hasattr(module, _ATTRIBUTE):
                delattr(module, _ATTRIBUTE)


@contextmanager
def _bounded(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass and recomputes the rest, if keeping everything is costly."""
    offloaded = is_offloaded(model)  # all of its weights would be kept too
    if activation_bytes(model.config, length) <= KEPT_BYTES and not offloaded:
        yield
        return
    names = {name.rpartition(".")[0] for name, module in model.named_modules() if hasattr(module, _ATTRIBUTE)}
    layers = [model.get_submodule(name) for name in sorted(names)]
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
    """Returns no mask: sequences are whole and unpadded, and the attention below is causal by itself."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: None,
    scaling: float | None = None,
    **_extras: Any,
) -> tuple[torch.Tensor, None]:
    task: _Task = getattr(module, _ATTRIBUTE)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if task.observe_keys is not None:
        task.observe_keys(task.layer, key[0])
    if task.visible is None:
        group = query.shape[1] // key.shape[1]
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale)
    else:
        attend = block_sparse_attention if task.visible.dtype == torch.bool else masked_attention
        output = attend(query[0], key[0], value[0], task.visible.to(query.device), scale)[None]
    if task.observe is not None:
        output = _Observed.apply(output, query, key, value, task, scale)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


class _Observed(torch.autograd.Function):
    """The identity; its backward pass shows the layer to the observer, and autograd then drops it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        task: _Task,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, output)
        ctx.task, ctx.scale = task, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output = (tensor.detach()[0] for tensor in ctx.saved_tensors)
        (gradient,) = gradients
        with torch.no_grad():
            ctx.task.observe(Observation(ctx.task.layer, q, k, v, output, gradient[0], ctx.scale))
        return gradient, None, None, None, None, None


def _sampled_gradient(model: PreTrainedModel, states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    parts = []
    for part in states.split(LOGITS_CHUNK):
        part = part.clone().requires_grad_()
        scores = _log_probabilities(model, part)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
        parts.append(torch.autograd.grad(scores.gather(1, drawn).sum(), part)[0])
    return torch.cat(parts)


def _divergence(
    model: PreTrainedModel, dense: torch.Tensor, sparse: torch.Tensor, differentiate: bool = False
) -> tuple[float, torch.Tensor]:
    """The divergence summed over the tokens, and its gradient with respect to the sparse states if requested."""
    total, parts = 0.0, []
    for reference, part in zip(dense.split(LOGITS_CHUNK), sparse.split(LOGITS_CHUNK), strict=True):
        with torch.no_grad():
            expected = _log_probabilities(model, reference.to(part.device))
        if differentiate:
            part = part.clone().requires_grad_()
        found = _log_probabilities(model, part)
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
        total += float(loss.detach())
        if differentiate:
            parts.append(torch.autograd.grad(loss, part)[0])
    return total, torch.cat(parts) if parts else torch.empty(0)


def _log_probabilities(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_of(model, states), dim=-1)
