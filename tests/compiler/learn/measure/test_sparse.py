"""Block-sparse attention with a backward pass, against the masked softmax and autograd, in fp64."""

import pytest
import torch

from surgeon.compiler.learn.measure.sparse import block_sparse_attention

BLOCKS, SIZE, DIM = 5, 16, 8


def inputs(heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, BLOCKS * SIZE, DIM), (kv_heads, BLOCKS * SIZE, DIM), (kv_heads, BLOCKS * SIZE, DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_it_is_the_masked_softmax_and_its_gradient(heads: int, kv_heads: int) -> None:
    q, k, v = inputs(heads, kv_heads)
    drawn = torch.rand((heads, BLOCKS, BLOCKS), generator=torch.Generator().manual_seed(1)) < 0.4
    visible = drawn.tril() | torch.eye(BLOCKS, dtype=torch.bool)
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
