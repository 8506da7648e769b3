"""The explicit mask and agreement under it, on a tiny random Llama."""

import math

import torch

from models import masked_model, sparse_topology, tiny_llama, tokens
from quality import agreement, explicit_mask, last_states, token_mask
from surgeon.runtime.evaluation import perplexity


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


def test_the_agreement_with_the_dense_model_is_that_of_the_whole_distributions() -> None:
    model, topology, ids = tiny_llama(), sparse_topology(), tokens(1, 600)
    dense = last_states(model, ids)
    with explicit_mask(model, topology):
        sparse = last_states(model, ids)
        loss = perplexity(model, [ids])
    with torch.no_grad():
        expected, found = (torch.log_softmax(model.lm_head(states[:-1]).double(), dim=-1) for states in (dense, sparse))
    result = agreement(model, dense, sparse, ids)
    divergence = (expected.exp() * (expected - found)).sum(dim=1).mean().item()
    assert abs(result.divergence / divergence - 1) < 1e-4
    assert abs(math.exp(result.dense_loss) / perplexity(model, [ids]) - 1) < 1e-5
    assert abs(math.exp(result.loss) / loss - 1) < 1e-5
    assert result.same_first == (expected.argmax(dim=1) == found.argmax(dim=1)).double().mean().item()
    same = agreement(model, dense, dense, ids)
    assert (same.divergence, same.same_first) == (0.0, 1.0)
