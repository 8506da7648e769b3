"""Block-sparse attention and attention under a mask, with their gradients, against the masked softmax and autograd."""

import pytest
import torch

from surgeon.compiler.learn.measure.attention import block_sparse_attention, masked_attention

BLOCKS, SIZE, DIM = 5, 16, 8


def inputs(heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, BLOCKS * SIZE, DIM), (kv_heads, BLOCKS * SIZE, DIM), (kv_heads, BLOCKS * SIZE, DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def pattern(heads: int) -> torch.Tensor:
    drawn = torch.rand((heads, BLOCKS, BLOCKS), generator=torch.Generator().manual_seed(1)) < 0.4
    return drawn.tril() | torch.eye(BLOCKS, dtype=torch.bool)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_it_is_the_masked_softmax_and_its_gradient(heads: int, kv_heads: int) -> None:
    q, k, v = inputs(heads, kv_heads)
    visible = pattern(heads)
    found = block_sparse_attention(q, k, v, visible, 0.3)

    tokens = visible.repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2).tril()
    keys, values = (tensor.repeat_interleave(heads // kv_heads, 0) for tensor in (k, v))
    scores = (q @ keys.transpose(1, 2) * 0.3).masked_fill(~tokens, -torch.inf)
    expected = torch.softmax(scores, dim=-1) @ values
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(found, (q, k, v), upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_a_hard_mask_is_block_sparse_attention() -> None:
    q, k, v = inputs(4, 2)
    visible = pattern(4)
    found = masked_attention(q, k, v, visible.double(), 0.3)
    torch.testing.assert_close(found, block_sparse_attention(q, k, v, visible, 0.3), atol=1e-6, rtol=1e-6)


def test_a_mask_s_gradient_is_that_of_the_masked_softmax() -> None:
    q, k, v = (tensor.detach() for tensor in inputs(4, 2))
    mask = torch.rand((4, BLOCKS, BLOCKS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = (mask.tril() + torch.eye(BLOCKS)).clamp(max=1)

    def reached(varied: torch.Tensor) -> torch.Tensor:
        return masked_attention(q, k, v, varied, 0.3).square().sum()

    (gradient,) = torch.autograd.grad(reached(mask.requires_grad_()), mask)
    step = torch.zeros_like(mask)
    step[2, 3, 1] = 1e-2
    with torch.no_grad():
        difference = (reached(mask + step) - reached(mask - step)) / 2e-2
    assert float(gradient[2, 3, 1]) == pytest.approx(float(difference), rel=1e-2)
