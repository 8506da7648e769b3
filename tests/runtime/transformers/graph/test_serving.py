"""One exported program that prefills and decodes, here and in another process: the patched model's own logits."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import Compiled, padded, sparse_topology, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import patch, serving_program, trace
from surgeon.runtime.errors import PackageError, PatchError
from surgeon.runtime.transformers.graph.serving import ServingStep

TOLERANCE = 2e-5  # of fp32 logits whose largest are about 10
LENGTHS = [(50, 33), (16,), (90, 1, 40)]  # includes one sequence, one token, sequences that end early
STEPS = 3


@pytest.fixture
def model(compiled: dict[str, Compiled], one_thread: None) -> LlamaForCausalLM:
    model = tiny_llama()
    patch(model, compiled["sparse"].package, recall="pattern")
    return model


def cache(batch: int, capacity: int) -> list[torch.Tensor]:
    # Slots that were never written are never read.
    return [torch.full((batch, 2, capacity, 32), torch.nan) for _ in range(3)]


def served(step: Any, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The logits of sequences whose first `lengths` tokens are the prompt and whose others come one by one."""
    batch, longest = len(lengths), max(lengths)
    ids = tokens(batch, longest + STEPS)
    keys, values = cache(batch, longest + STEPS), cache(batch, longest + STEPS)
    position = torch.tensor(lengths)
    prompt = step(ids[:, :longest].contiguous(), torch.zeros_like(position), torch.arange(longest), keys, values)
    logits = [prompt[row, :length] for row, length in enumerate(lengths)]
    for _ in range(STEPS):
        new = step(ids.gather(1, position[:, None]), position, torch.tensor([0]), keys, values)
        logits = [torch.cat(pair) for pair in zip(logits, new, strict=True)]
        position += 1
    return logits


def check(step: Any, model: LlamaForCausalLM) -> None:
    for lengths in LENGTHS:
        ids = tokens(len(lengths), max(lengths) + STEPS)
        for row, found in enumerate(served(step, lengths)):
            expected = model(ids[row : row + 1, : len(found)]).logits[0]
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_prefill_and_decoding(model: LlamaForCausalLM) -> None:
    check(ServingStep(model), model)
    check(serving_program(model).module(), model)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The package of `model` in a folder of its own: the same bytes, and so the same id."""
    return compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",))


def elsewhere(kind: str, kernels: Path, program: Path, calls: Sequence[Any]) -> list[torch.Tensor]:
    """The result of each call in a process that has only the package and the program."""
    given, results = program.with_suffix(".calls"), program.with_suffix(".results")
    torch.save(calls, given)
    script = Path(__file__).with_name("serving_process.py")
    subprocess.run([sys.executable, script, kind, kernels, program, given, results], check=True)
    found: list[torch.Tensor] = torch.load(results)
    return found


@torch.no_grad()
def check_elsewhere(kind: str, kernels: Path, program: Path, model: LlamaForCausalLM) -> None:
    """Calls with prompts of two lengths, then with a token each."""
    lengths = torch.tensor([20, 33])
    ids = tokens(2, 34)
    caches = cache(2, 40), cache(2, 40)
    calls = [
        (ids[:, :33].contiguous(), torch.zeros(2, dtype=torch.int64), torch.arange(33), *caches),
        (ids.gather(1, lengths[:, None]), lengths, torch.tensor([0]), *caches),
    ]
    prompt, new = elsewhere(kind, kernels, program, calls)
    for row, length in enumerate(lengths.tolist()):
        found = torch.cat((prompt[row, :length], new[row]))
        expected = model(ids[row : row + 1, : length + 1]).logits[0]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_saved_and_loaded_in_another_process(model: LlamaForCausalLM, kernels: Path, tmp_path: Path) -> None:
    torch.export.save(serving_program(model), tmp_path / "model.pt2")
    check_elsewhere("export", kernels, tmp_path / "model.pt2", model)


@pytest.mark.slow
def test_a_traced_graph_saved_and_loaded(compiled: dict[str, Compiled], kernels: Path, tmp_path: Path) -> None:
    ids, mask = padded((70, 41))
    graph = trace(tiny_llama(), compiled["sparse"].package, recall="pattern")
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(graph, padded((3, 2)), dynamic_shapes=(any_size, any_size))
    torch.export.save(program, tmp_path / "graph.pt2")
    (found,) = elsewhere("export", kernels, tmp_path / "graph.pt2", [(ids, mask)])
    assert torch.equal(found, graph(ids, mask))


@pytest.mark.slow
def test_compiled_ahead_of_time(model: LlamaForCausalLM, kernels: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(
        serving_program(model),
        package_path=str(path),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # takes half the time
    )
    check_elsewhere("aoti", kernels, path, model)


def test_a_program_whose_package_is_not_loaded(model: LlamaForCausalLM) -> None:
    step = serving_program(model).module()
    for node in step.graph.find_nodes(op="call_function", target=torch.ops.surgeon.attention.default):
        node.args = (*node.args[:-2], "0" * 64 + ":strict", node.args[-1])
    step.recompile()
    message = r"expected package 000000000000 loaded with strict, got none.*call surgeon.runtime.load"
    with pytest.raises(PackageError, match=message):
        served(step, (3, 2))


def test_a_full_cache(model: LlamaForCausalLM) -> None:
    step = serving_program(model).module()
    with pytest.raises(PatchError, match="expected 5 new tokens within the cache's 6, got positions"):
        step(tokens(2, 5), torch.tensor([1, 2]), torch.tensor([0]), cache(2, 6), cache(2, 6))


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(PatchError, match=r"expected a model that is patched in every layer, got model\.layers\.0"):
        serving_program(tiny_llama())
