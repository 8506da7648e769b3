"""Block digits that are learned by gradient: soft trees whose hard values are p-adic paths.

Every block of every head has a row of digits, held as logits. Sampled digits (Gumbel-softmax) give an expected distance
between two blocks; comparing it with the head's cut gives a soft mask. The hard digits give the mask that is used, with
the gradient of the soft one. All blocks begin with equal digits, so a head begins dense.

Source: the Llama Surgery method; Gumbel-softmax (arXiv 1611.01144) and straight-through gradients (arXiv 1308.3432).
"""

from dataclasses import dataclass

import torch

_COLLAPSED = 3.0  # initial lead of a block's first digit over the others


@dataclass(frozen=True)
class Sample:
    """A layer's masks, `[heads, blocks, blocks]`, 1 where visible, and a measure of how evenly its digits are used.

    The masks are hard, with the soft ones' gradient. `balance` is 0 if all digits are equally frequent, and arity − 1
    if only one is used.
    """

    masks: torch.Tensor
    balance: torch.Tensor


def depth_for(blocks: int, arity: int) -> int:
    """The number of digits needed to distinguish all blocks."""
    depth = 1
    while arity**depth < blocks:
        depth += 1
    return depth


def collapsed_logits(heads: int, blocks: int, arity: int) -> torch.Tensor:
    """Logits of equal paths for all blocks: `[heads, blocks, depth, arity]`."""
    logits = torch.zeros(heads, blocks, depth_for(blocks, arity), arity)
    logits[..., 0] = _COLLAPSED
    return logits


def expected_distances(digits: torch.Tensor) -> torch.Tensor:
    """Depth − expected length of the common prefix, for digits (distributions) `[heads, blocks, depth, arity]`.

    The agreement of a prefix is the least agreement of its digits: a cumulative minimum, whose gradient stays finite
    where a product's does not. For one-hot digits this is the ultrametric of the paths.
    """
    agreement = torch.einsum("hikp,hjkp->hijk", digits, digits)
    prefix = torch.cummin(agreement, dim=3).values
    return digits.shape[2] - prefix.sum(dim=3)


def hard_digits(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest digits, one-hot; the first of equally likely ones."""
    return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)


def sample(
    logits: torch.Tensor,
    cuts: torch.Tensor,
    always: torch.Tensor,
    temperature: float,
    noise: float,
    generator: torch.Generator,
) -> Sample:
    """Draws digits and computes the masks of a layer.

    `logits` `[heads, blocks, depth, arity]` and `cuts` `[heads]`, distances, are learned; `always` is bool
    `[blocks, blocks]`, the sink and the window; `noise` scales the Gumbel noise, which is drawn in fp32.
    """
    uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
    noisy = logits.float() - noise * torch.log(-torch.log(uniform))
    soft = torch.softmax(noisy / temperature, dim=-1)
    inside = torch.sigmoid((cuts.float()[:, None, None] + 0.5 - expected_distances(soft)) / temperature)
    with torch.no_grad():
        hard = expected_distances(hard_digits(noisy)) <= cuts.float().round()[:, None, None]
    masks = inside + (hard.to(inside.dtype) - inside).detach()
    blocks = always.shape[0]
    masks = torch.where(always, torch.ones_like(masks), masks) * torch.ones(blocks, blocks).tril()
    usage = soft.mean(dim=1)
    balance = (usage.square().sum(dim=-1) * logits.shape[-1] - 1).mean()
    return Sample(masks, balance)
