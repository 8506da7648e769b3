"""A patched model under torch.compile: one graph without breaks, for prefill and decoding of any length."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from models import Compiled, padded, tiny_llama
from surgeon.runtime import SurgeonCache, load, patch, unpatch

TOLERANCE = 2e-5  # of fp32 logits whose largest are about 10


@pytest.fixture
def model(compiled: dict[str, Compiled], one_thread: None) -> Iterator[LlamaForCausalLM]:
    torch.compiler.reset()
    counters.clear()
    model = tiny_llama()
    patch(model, compiled["sparse"].package, recall="pattern")
    with torch.no_grad():
        yield model
    torch.compiler.reset()


def whole(model: LlamaForCausalLM) -> Any:
    """The model compiled as one graph, or an error; without code generation, which `test_serving` covers."""
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)


def graphs() -> int:
    """The number of graphs so far; none of them has a break."""
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_prefill_of_any_length(model: LlamaForCausalLM) -> None:
    step = whole(model)
    for lengths in ((70, 41), (33, 40), (100, 5, 7)):
        ids, mask = padded(lengths)
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        found = step(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
def test_decoding(model: LlamaForCausalLM, static: bool) -> None:
    def cache() -> Cache:
        if not static:
            return DynamicCache(config=model.config)
        made = StaticCache(model.config, max_cache_len=64)
        made.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
        return made

    ids, mask = padded((45, 30))
    step, caches = whole(model), (cache(), cache())
    for begin, end in ((0, 38), (38, 39), (39, 40), (40, 41), (41, 45)):
        arguments = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        expected, found = (
            run(**arguments, past_key_values=past).logits for run, past in zip((model, step), caches, strict=True)
        )
        seen = mask[:, begin:end].bool()
        torch.testing.assert_close(found[seen], expected[seen], atol=TOLERANCE, rtol=0)
    assert graphs() <= 3


def decoded(run: Any, cache: Cache, ends: tuple[int, ...]) -> torch.Tensor:
    """The logits of every token that is not padding, computed in parts that end at these tokens."""
    ids, mask = padded((45, 30))
    parts = [
        run(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        for begin, end in zip((0, *ends), ends, strict=False)
    ]
    return torch.cat(parts, dim=1)[mask[:, : ends[-1]].bool()]


@pytest.mark.slow
def test_under_autocast(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    """In one graph, which casts queries, keys and values as the model does without it."""
    unpatch(model)
    patch(model, load(compiled["sparse"].package._files.folder), recall="pattern")  # runs bf16, but in fp32 kernels
    exact = decoded(model, DynamicCache(config=model.config), (38, 39))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = decoded(model, DynamicCache(config=model.config), (38, 39))
        found = decoded(whole(model), DynamicCache(config=model.config), (38, 39))
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert graphs() <= 2


@pytest.mark.slow
def test_a_surgeon_cache_breaks_the_graph_at_its_layers(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    """It gives the same logits, bit for bit, and whoever insists on one graph is told why there is none."""
    package = compiled["sparse"].package
    expected = decoded(model, SurgeonCache(package), (38, 39))
    with_breaks = torch.compile(model, backend="eager", dynamic=True)
    assert torch.equal(decoded(with_breaks, SurgeonCache(package), (38, 39)), expected)
    assert all("a SurgeonCache drops blocks as it goes" in reason for reason in counters["graph_break"])
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="SurgeonCache drops blocks as it goes: give a DynamicCache"
    ):
        decoded(whole(model), SurgeonCache(package), (38,))
