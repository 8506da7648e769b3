"""A patched model under torch's own exporters: torch.export with any batch and length; torch.jit.trace is refused."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import Compiled, padded, tokens
from surgeon.runtime import patch
from surgeon.runtime.errors import PatchError

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def patched(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    patch(model, compiled["sparse"].package, recall="pattern")
    return model


@pytest.mark.slow
def test_torch_export(patched: LlamaForCausalLM) -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}

    def call(lengths: tuple[int, ...]) -> dict[str, Any]:
        ids, mask = padded(lengths)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
    program = torch.export.export(patched, (), kwargs=call((40, 30)), dynamic_shapes=shapes)
    sites = program.graph.find_nodes(op="call_function", target=torch.ops.surgeon.attention.default)
    assert len(sites) == 3
    for lengths in ((70, 41), (33, 40, 1), (90,)):
        found, expected = (run(**call(lengths)).logits for run in (program.module(), patched))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


class Logits(torch.nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits


@pytest.mark.parametrize("given", [1, 2], ids=["without a mask", "with a mask"])
def test_torch_jit_trace_is_refused(patched: LlamaForCausalLM, given: int) -> None:
    ids = tokens(2, 20)
    with pytest.raises(PatchError, match=r"torch.jit.trace: expected .*; use surgeon.runtime.trace\(model, package\)"):
        torch.jit.trace(Logits(patched), (ids, torch.ones_like(ids))[:given])
