"""The frozen decoder under a pattern: its log-probabilities and divergences equal the model's own."""

import pytest
import torch

from families import of_family, tiny
from models import masked_model, sparse_topology, tiny_llama, tokens
from surgeon.compiler.learn.measure.decoder import Observation, dense_states, observe_sparse, sparse_divergence
from surgeon.compiler.learn.measure.responses import responses
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.learn.patterns.windows import window_patterns
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.logits import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = tokens(1, 64)


@pytest.mark.parametrize("family", ["llama", "granite"])  # Granite divides its logits
def test_the_dense_log_probabilities_are_the_models_own(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        found = torch.log_softmax(logits_of(model, dense_states(model, IDS)), dim=-1)
        expected = torch.log_softmax(model(IDS).logits[0], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_divergence_is_that_of_the_models_own_logits(family: str) -> None:
    model, topology = tiny(family), of_family(sparse_topology(), family)
    visible = [torch.from_numpy(topology.block_mask(layer, 4)) for layer in range(3)]
    found = sparse_divergence(model, IDS, dense_states(model, IDS), visible)
    with torch.no_grad():
        dense, sparse = (
            torch.log_softmax(each(IDS).logits[0].double(), dim=-1) for each in (model, masked_model(model, topology))
        )
    assert found > 1e-3
    assert found == pytest.approx(float((dense.exp() * (dense - sparse)).sum(dim=1).mean()), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_divergence_for_answers_is_that_of_the_tokens_after_a_prompt(family: str) -> None:
    """The prompt of 32 tokens and its continuation are one call, whose last rows ask."""
    model, topology = tiny(family), of_family(sparse_topology(), family)
    grid = Grid(16, 4, 1, 0.5, asking=2, scored=20)
    visible = [grid.with_asking(torch.from_numpy(topology.block_mask(layer, 4))) for layer in range(3)]
    found = sparse_divergence(model, IDS, dense_states(model, IDS), visible, grid.scored)
    with torch.no_grad():
        models = (model, masked_model(model, topology, dense_rows=32))
        dense, sparse = (torch.log_softmax(each(IDS).logits[0, -20:].double(), dim=-1) for each in models)
    assert found > 1e-4
    assert found == pytest.approx(float((dense.exp() * (dense - sparse)).sum(dim=1).mean()), rel=1e-3)


def test_changes_for_answers_are_the_slope_of_their_divergence() -> None:
    """Another window of one head changes the divergence about as much as the gradient says."""
    model = tiny_llama()
    grid = Grid(16, 8, 1, 0.5, asking=3, scored=20)
    ids = tokens(1, 128)
    dense = dense_states(model, ids)
    windows = grid.with_asking(window_patterns(8, 1))
    visible = [windows[[5, 5, 5, 5]] for _ in range(3)]
    found: dict[int, torch.Tensor] = {}

    def observe(layer: Observation) -> None:
        found[layer.layer] = responses(layer, windows)[0]

    before = observe_sparse(model, ids, dense, visible, observe, grid.scored)
    for layer, head, window in ((0, 1, 6), (1, 3, 4), (1, 0, 6)):
        other = [mask.clone() for mask in visible]
        other[layer][head] = windows[window]
        change = (sparse_divergence(model, ids, dense, other, grid.scored) - before) * grid.scored
        assert change == pytest.approx(float(found[layer][head, window]), rel=0.5, abs=2e-3)
    assert found[2].abs().max() < 1e-9  # nothing reads the prompt's rows of the last layer


def test_a_model_that_makes_its_logits_otherwise_is_refused() -> None:
    model = tiny_llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: head(states) * (2.0 if states.ndim == 3 else 1.0)
    with pytest.raises(ModelError, match="cannot be evaluated or learned on"):
        dense_states(model, IDS)
