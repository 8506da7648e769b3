"""A tensor-parallel model runs each process's own heads, with the same results as in one process."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from models import SHAPE, Compiled, padded, sparse_topology, tiny_config, tiny_llama
from processes import torchrun
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import fingerprint, load, patch, weights_id
from surgeon.runtime.errors import PatchError
from topologies import dense_topology

TOLERANCE = 2e-5  # of fp32 logits whose largest are about 10


def inputs(queries: int, keys: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q of four heads, k and v of two KV heads, for two sequences."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, queries, 32), (2, 2, keys, 32), (2, 2, keys, 32))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("queries", [1, 9, 70], ids=["decode", "chunk", "prefill"])
@pytest.mark.parametrize("layer", range(3))
def test_a_part_is_the_whole_for_its_heads(compiled: dict[str, Compiled], layer: int, queries: int) -> None:
    package = compiled["sparse"].package
    q, k, v = inputs(queries, 70)
    cache_leftpad = torch.tensor([0, 21])
    whole, whole_lse = package.attention_with_lse(layer, q, k, v, cache_leftpad=cache_leftpad)
    for head in range(2):
        heads, kv_heads = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        part = package.part(range(head, head + 1))
        out, lse = part.attention_with_lse(
            layer, q[:, heads], k[:, kv_heads], v[:, kv_heads], cache_leftpad=cache_leftpad
        )
        torch.testing.assert_close(out, whole[:, :, heads], atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, whole_lse[:, heads], atol=1e-6, rtol=0)


def test_gradients_of_a_part_are_those_of_the_whole(compiled: dict[str, Compiled]) -> None:
    package = compiled["sparse"].package
    second = package.part(range(1, 2))
    whole = [tensor.requires_grad_() for tensor in inputs(70, 70)]
    package.attention(0, *whole).square().sum().backward()
    heads = (slice(2, 4), slice(1, 2), slice(1, 2))
    part = [tensor[:, own].detach().requires_grad_() for tensor, own in zip(whole, heads, strict=True)]
    second.attention(0, *part).square().sum().backward()
    for own, tensor, everything in zip(heads, part, whole, strict=True):
        assert everything.grad is not None
        torch.testing.assert_close(tensor.grad, everything.grad[:, own], atol=1e-5, rtol=0)


def test_a_part_of_a_paged_cache(compiled: dict[str, Compiled]) -> None:
    """The second KV head's blocks, each in its own slot, in descending order."""
    package, (q, k, v) = compiled["sparse"].package, inputs(6, 64)
    slots = [tensor[:, 1].reshape(2 * 4, 16, 32).flip(0) for tensor in (k, v)]
    block_table = torch.arange(8, dtype=torch.int32).flip(0).reshape(2, 1, 4)
    part = package.part(range(1, 2))
    position = torch.tensor([58, 58])
    found = torch.ops.surgeon.attention_paged(q[:, 2:], *slots, block_table, position, None, 32**-0.5, 0, 0, part.id, 1)
    torch.testing.assert_close(found, package.attention(1, q, k, v)[:, :, 2:], atol=1e-6, rtol=0)


def test_parts_are_apart(compiled: dict[str, Compiled]) -> None:
    package = compiled["sparse"].package
    parts = [package.part(range(head, head + 1)) for head in range(2)]
    assert len({package.id, *(part.id for part in parts)}) == 3
    assert package.part(range(2)) is package
    assert parts[0].part(range(1, 2)).id == parts[1].id
    assert [*package.kv_heads, *parts[1].kv_heads] == [0, 1, 1]
    with pytest.raises(PatchError, match=r"q: expected \[batch, 2, length, 32\], got \[2, 4, 5, 32\]"):
        parts[0].attention(0, *inputs(5, 5))
    for wrong in (range(0), range(1, 3), range(-1, 1), range(0, 2, 2)):
        with pytest.raises(PatchError, match=r"consecutive KV heads out of 0\.\.1"):
            package.part(wrong)


def fused_model() -> Phi3ForCausalLM:
    """A model whose queries, keys and values come from one projection, gathered by each process."""
    torch.manual_seed(0)
    shape = tiny_config(hidden_size=128).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: shape[name] for name in (*names, "num_key_value_heads", "initializer_range", "pad_token_id")}
    return Phi3ForCausalLM(Phi3Config(**config, eos_token_id=None, bos_token_id=None)).eval()


def fused_topology() -> Topology:
    topology = sparse_topology()
    return dataclasses.replace(topology, model=dataclasses.replace(topology.model, model_type="phi3"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, compiled: dict[str, Compiled]) -> list[dict[str, Any]]:
    """The results of each of two processes; see tensor_parallel_process.py."""
    folder, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("found")
    tiny_llama().save_pretrained(folder / "model")
    sparse = compiled["sparse"].topology
    known = dataclasses.replace(sparse.model, weights_sha256=weights_id(tiny_llama()))
    compile_package(dataclasses.replace(sparse, model=known), folder / "package", dtypes=("fp32",))
    for name, heads, kv_heads in (("one-head", 4, 1), ("three-heads", 6, 3)):
        config = tiny_config(
            num_hidden_layers=1, hidden_size=96, num_attention_heads=heads, num_key_value_heads=kv_heads
        )
        tiny_llama(config).save_pretrained(folder / name)
        topology = dense_topology(num_heads=heads, **(SHAPE | {"num_kv_heads": kv_heads}))
        compile_package(topology, folder / f"{name}-package", dtypes=("fp32",))
    fused_model().save_pretrained(folder / "fused")
    compile_package(fused_topology(), folder / "fused-package", dtypes=("fp32",))
    torchrun(Path(__file__).with_name("tensor_parallel_process.py"), folder, out)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_answer_as_one(
    found: list[dict[str, Any]], compiled: dict[str, Compiled], one_thread: None
) -> None:
    model = tiny_llama()
    patch(model, compiled["sparse"].package, recall="pattern")
    ids, mask = padded((70, 41, 5))
    prompt, prompt_mask = padded((50, 33, 3))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    for process in found:
        torch.testing.assert_close(process["logits"][mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)
        for cache in (None, "static"):
            tokens = model.generate(prompt, attention_mask=prompt_mask, max_new_tokens=24, do_sample=False)
            assert torch.equal(process[f"generated {cache}"], tokens)
        assert process["fingerprint"] == fingerprint(model)
        assert process["weights_id"] == weights_id(model)
        assert process["same again"]


@pytest.mark.slow
def test_a_gathered_projection_gives_every_process_all_heads(
    found: list[dict[str, Any]], tmp_path: Path, one_thread: None
) -> None:
    model, (ids, mask) = fused_model(), padded((70, 41, 5))
    patch(model, load(compile_package(fused_topology(), tmp_path / "package", dtypes=("fp32",))), recall="pattern")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    for process in found:
        assert process["fused heads"] == [range(2)] * 3
        torch.testing.assert_close(process["fused logits"][mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_each_process_has_its_own_heads(found: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(found):
        assert process["heads"] == [range(rank, rank + 1)] * 3


@pytest.mark.slow
def test_what_cannot_be_split_is_refused(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "divides the 1 KV heads, got 2 processes, which would split a KV head; start 1" in process["one head"]
        assert "divides the 3 KV heads, got 2 processes" in process["three heads"]
        assert "start 1 or 3 processes" in process["three heads"]
        assert "model.layers.0.self_attn.k_proj: expected weights split over the processes" in process["replicated"]
        assert "one whose weights processes share; use patch(model, package)" in process["trace"]
        assert "touched" not in process["one head"] + process["three heads"] + process["replicated"]
