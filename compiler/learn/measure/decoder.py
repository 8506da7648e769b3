"""A frozen decoder run under patterns of blocks: its divergence, and an observer at every attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.attending import Attend, attending, bounded, dense_attention, last_states
from surgeon.compiler.learn.measure.attention import block_sparse_attention, masked_attention
from surgeon.runtime.evaluate.logits import hidden_states, logits_of

LOGITS_CHUNK = 512
"""The positions whose logits are computed at a time."""


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


def dense_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The dense model's last hidden states of one sequence `[1, length]`: `[length, hidden]`, on the CPU.

    Raises:
        ModelError: the model computes its logits from them in an unknown way.
    """
    with torch.inference_mode(), attending(model, _under(None)):
        return hidden_states(model, tokens).clone().cpu()


def sparse_divergence(
    model: PreTrainedModel, tokens: torch.Tensor, dense: torch.Tensor, visible: Sequence[torch.Tensor], scored: int = 0
) -> float:
    """Mean KL divergence, in nats per token, of the dense model's next-token distribution from the pattern's.

    `dense` holds the dense model's last hidden states; `visible` holds bool `[heads, blocks, blocks]` for each layer.
    Only the last `scored` tokens count; all do if it is 0.
    """
    return attended_divergence(model, tokens, dense, _under(visible), scored)


def attended_divergence(
    model: PreTrainedModel, tokens: torch.Tensor, dense: torch.Tensor, attend: Attend, scored: int = 0
) -> float:
    """The same under any attention."""
    with torch.inference_mode(), attending(model, attend):
        counted = last_states(model, tokens)[-scored:]
        return _divergence(model, dense[-scored:], counted)[0] / len(counted)


def observe_dense(
    model: PreTrainedModel, tokens: torch.Tensor, generator: torch.Generator, observe: Observer, scored: int = 0
) -> torch.Tensor:
    """Calls `observe` for each layer, last layer first, with gradients of the log-likelihood of sampled next tokens.

    The next tokens are drawn from the model's own distribution, so that the mean outer product of these gradients is
    the Fisher information. Only those after the last `scored` tokens are drawn; all are if it is 0. Returns the last
    hidden states.
    """
    with attending(model, _under(None, observe)), bounded(model, tokens.shape[1]):
        states = last_states(model, tokens, differentiable=True)
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
    with attending(model, _under(visible, observe)), bounded(model, tokens.shape[1]):
        states = last_states(model, tokens, differentiable=True)
        counted = states[-scored:]
        total, gradient = _divergence(model, dense[-scored:], counted.detach(), differentiate=True)
        counted.backward(gradient)
    return total / len(counted)


def observe_keys(model: PreTrainedModel, tokens: torch.Tensor, observe: Callable[[int, torch.Tensor], None]) -> None:
    """Calls `observe(layer, keys)` for each layer of the dense model, with keys `[KV heads, length, head_dim]`."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        observe(layer, k[0])
        return dense_attention(q, k, v, scale)

    with torch.inference_mode(), attending(model, attend):
        last_states(model, tokens)


def pull_masks(
    model: PreTrainedModel, tokens: torch.Tensor, dense: torch.Tensor, masks: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The mean divergence and its gradient with respect to the masks.

    `masks` holds numbers from 0 to 1, `[layers, heads, blocks, blocks]`; otherwise as for `sparse_divergence`.
    """
    varied = masks.detach().requires_grad_()
    with attending(model, _under(varied.unbind())), bounded(model, tokens.shape[1]):
        states = last_states(model, tokens)
        total, gradient = _divergence(model, dense, states.detach(), differentiate=True)
        (pull,) = torch.autograd.grad(states, varied, gradient / tokens.shape[1])
    return total / tokens.shape[1], pull


def _under(visible: Sequence[torch.Tensor] | None, observe: Observer | None = None) -> Attend:
    """Attention under a pattern, or dense attention; the backward pass shows it to the observer."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if visible is None:
            output = dense_attention(q, k, v, scale)
        else:
            own = visible[layer]
            sparse = block_sparse_attention if own.dtype == torch.bool else masked_attention
            output = sparse(q[0], k[0], v[0], own.to(q.device), scale)[None]
        if observe is None:
            return output
        observed: torch.Tensor = _Observed.apply(output, q, k, v, observe, layer, scale)  # type: ignore[no-untyped-call]
        return observed

    return attend


class _Observed(torch.autograd.Function):
    """The identity; its backward pass shows the layer to the observer, and autograd then drops it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        observe: Observer,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, output)
        ctx.observe, ctx.layer, ctx.scale = observe, layer, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output = (tensor.detach()[0] for tensor in ctx.saved_tensors)
        (gradient,) = gradients
        with torch.no_grad():
            ctx.observe(Observation(ctx.layer, q, k, v, output, gradient[0], ctx.scale))
        return gradient, None, None, None, None, None, None


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
