"""The check of a call's output against fp64, before it is timed."""

import torch

from surgeon.compiler.tune.exact import sampled_error

TOLERANCE = 5e-3
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class WrongResultError(ArithmeticError):
    """A call whose output is not that of the definition."""


def checked(what: str, mask: torch.Tensor, block_size: int, tensors: Tensors, out: torch.Tensor) -> float:
    """Returns the relative error of the first sequence's output at a sample of its queries.

    `mask` is over blocks, `[heads, rows, blocks]`.

    Raises:
        WrongResultError: it is not below `TOLERANCE`.
    """
    error = sampled_error(mask, block_size, *tensors, out)
    if not error < TOLERANCE:
        raise WrongResultError(f"{what}: expected a relative error below {TOLERANCE}, got {error:.1e}")
    return error
