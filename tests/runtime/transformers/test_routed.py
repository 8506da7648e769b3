"""Routed heads in a model: patched, traced, compiled and exported, they choose the same blocks."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import padded, routed_topology, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load, patch, serving_program, trace, unpatch
from surgeon.runtime.transformers.graph.serving import ServingStep

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10; a traced model rotates queries and keys by itself
LENGTHS = ((150, 41), (96,), (5, 130, 1))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return load(compile_package(routed_topology(), tmp_path_factory.mktemp("package") / "kernels", dtypes=("fp32",)))


@pytest.fixture
def patched(package: Package) -> LlamaForCausalLM:
    model = tiny_llama()
    patch(model, package)
    return model


def logits(model: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    """The logits of all tokens that are no padding."""
    ids, mask = padded(lengths)
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found[mask.bool()]


def test_every_row_chooses_unless_recall_says_dense(patched: LlamaForCausalLM, package: Package) -> None:
    found = []
    for recall in (None, "pattern", "dense"):
        unpatch(patched)
        patch(patched, package, recall=recall)
        found.append(logits(patched, LENGTHS[0]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_traced_model(patched: LlamaForCausalLM, package: Package) -> None:
    graph = trace(tiny_llama(), package)
    for lengths in LENGTHS:
        ids, mask = padded(lengths)
        torch.testing.assert_close(graph(ids, mask)[mask.bool()], logits(patched, lengths), atol=TOLERANCE, rtol=0)


def test_a_compiled_model(patched: LlamaForCausalLM) -> None:
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in LENGTHS[:2]:
        torch.testing.assert_close(logits(compiled, lengths), logits(patched, lengths), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_an_exported_model(patched: LlamaForCausalLM) -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids, mask = padded((40, 30))
    program = torch.export.export(
        patched,
        (),
        kwargs={"input_ids": ids, "attention_mask": mask, "use_cache": False},
        dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None},
    )
    for lengths in LENGTHS:
        found = logits(program.module(), lengths)
        torch.testing.assert_close(found, logits(patched, lengths), atol=TOLERANCE, rtol=0)


def test_a_serving_program(patched: LlamaForCausalLM) -> None:
    """The logits of a prompt, and of tokens after it, which choose by themselves, are those of the patched model."""
    ids, start = tokens(2, 133), torch.zeros(2, dtype=torch.int64)
    found = []
    for step in (ServingStep(patched), serving_program(patched).module()):
        keys, values = ([torch.full((2, 2, 140, 32), torch.nan) for _ in range(3)] for _ in range(2))
        prompt = step(ids[:, :130].contiguous(), start, torch.arange(130), keys, values)
        torch.testing.assert_close(prompt, patched(ids[:, :130]).logits, atol=TOLERANCE, rtol=0)
        told = [prompt]
        for position in range(130, 133):
            told.append(
                step(ids[:, position : position + 1].contiguous(), start + position, torch.tensor([0]), keys, values)
            )
        found.append(torch.cat(told, dim=1))
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[0][:, -1], _decoded(patched, ids), atol=TOLERANCE, rtol=0)


def _decoded(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The last token's logits `[batch, vocabulary]` where the last three come one by one."""
    output = model(ids[:, :130], use_cache=True)
    for position in range(130, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
    found: torch.Tensor = output.logits[:, -1]
    return found
