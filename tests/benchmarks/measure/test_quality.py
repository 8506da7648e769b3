"""The explicit mask, on a tiny random Llama."""

import torch

from measure.quality import explicit_mask, token_mask
from models import masked_model, sparse_topology, tiny_llama, tokens


def test_the_mask_is_the_topologys_within_causality() -> None:
    topology = sparse_topology()
    mask = token_mask(topology, 1, 50)
    assert mask.shape == (1, 4, 50, 50)
    blocks = topology.block_mask(1, 4)
    expected = [[[j <= i and blocks[h, i // 16, j // 16] for j in range(50)] for i in range(50)] for h in range(4)]
    assert mask[0].tolist() == expected


def test_the_model_under_the_explicit_mask_is_as_with_plain_softmax_under_it() -> None:
    model, topology, ids = tiny_llama(), sparse_topology(), tokens(1, 100)
    with torch.no_grad():
        dense = model(ids).logits
        with explicit_mask(model, topology):
            sparse = model(ids).logits
        expected = masked_model(model, topology)(ids).logits
        again = model(ids).logits
    torch.testing.assert_close(sparse, expected, atol=1e-4, rtol=0)
    assert (sparse - dense).abs().max() > 0.1
    assert torch.equal(again, dense)
