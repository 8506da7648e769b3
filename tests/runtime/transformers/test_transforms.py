"""A patched model under torch.func: the gradients of torch.autograd, per sequence too, and batches as in a loop."""

import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import Compiled, padded, tokens
from surgeon.runtime import SurgeonCache, patch
from surgeon.runtime.errors import PatchError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # which torch's own forward mode uses
]

Weights = dict[str, torch.Tensor]


@pytest.fixture
def patched(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    patch(model, compiled["sparse"].package, recall="pattern")
    return model


def loss(model: torch.nn.Module, weights: Weights, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100), "use_cache": False}
    found: torch.Tensor = torch.func.functional_call(model, weights, (), call).loss
    return found


def check(found: Weights, expected: Weights) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_gradients_of_a_batch_and_of_each_sequence(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((50, 33))
    weights = {name: weight.detach() for name, weight in patched.named_parameters()}

    def expected(ids: torch.Tensor, mask: torch.Tensor) -> Weights:
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        gradients = torch.autograd.grad(loss(patched, leaves, ids, mask), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    check(torch.func.grad(lambda w: loss(patched, w, ids, mask))(weights), expected(ids, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where an op is called in a loop, for want of a batching rule
        each = torch.func.vmap(torch.func.grad(lambda *given: loss(patched, *given)), (None, 0, 0))(
            weights, ids[:, None], mask[:, None]
        )
    for row in range(2):
        check({name: gradient[row] for name, gradient in each.items()}, expected(ids[row, None], mask[row, None]))


@torch.no_grad()
def test_vmap(patched: LlamaForCausalLM) -> None:
    ids = tokens(3, 40)
    found = torch.func.vmap(lambda row: patched(row[None]).logits[0])(ids)
    torch.testing.assert_close(found, patched(ids).logits, atol=2e-5, rtol=0)


REFUSED: dict[str, Any] = {
    "jvp": lambda call, ids: torch.func.jvp(call, (ids,), (torch.ones_like(ids),)),
    "jacfwd": lambda call, ids: torch.func.jacfwd(call)(ids),
}


@pytest.mark.parametrize("way", REFUSED)
def test_forward_mode_is_refused(patched: LlamaForCausalLM, way: str) -> None:
    embedded = patched.get_input_embeddings()(tokens(1, 20)).detach()
    with pytest.raises(PatchError, match="expected reverse-mode gradients"):
        REFUSED[way](lambda e: patched(inputs_embeds=e).logits.sum(), embedded)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_a_surgeon_cache_is_refused(patched: LlamaForCausalLM, compiled: dict[str, Compiled], transform: Any) -> None:
    """It would keep what the transform wraps."""
    cache = SurgeonCache(compiled["sparse"].package)
    given = torch.randn(1, 9, 64) if transform is torch.func.grad else torch.randn(2, 1, 9, 64)
    with pytest.raises(PatchError, match=r"SurgeonCache: layer 0: expected a call outside of torch.func's transforms"):
        transform(lambda e: patched(inputs_embeds=e, past_key_values=cache).logits.sum())(given)
