"""The frozen decoder under a pattern: its log-probabilities and divergences equal the model's own."""

import pytest
import torch

from families import of_family, tiny
from models import masked_model, sparse_topology, tiny_llama, tokens
from surgeon.compiler.learn.measure.decoder import dense_states, sparse_divergence
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


def test_a_model_that_makes_its_logits_otherwise_is_refused() -> None:
    model = tiny_llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: head(states) * (2.0 if states.ndim == 3 else 1.0)
    with pytest.raises(ModelError, match="cannot be evaluated or learned on"):
        dense_states(model, IDS)
