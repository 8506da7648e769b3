"""A model with a SurgeonCache equals, bit for bit, the one with a DynamicCache, in less memory, or it says why not."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import routing
from gpu_standin import on_gpu
from models import (
    SHAPE,
    Compiled,
    masked_model,
    padded,
    routed_topology,
    sparse_topology,
    tiny_config,
    tiny_llama,
    tokens,
)
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, SurgeonCache, load, patch, unpatch
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.operands import Operands
from surgeon.runtime.transformers.cache import PagedLayer
from topologies import window_topology

pytestmark = pytest.mark.usefixtures("no_gradients")

BLOCK = SHAPE["block_size"]
WINDOWS = (2, 1, 1, 3)  # in blocks, per head; two neighbours share a KV head


@pytest.fixture(scope="session")
def packages(compiled: dict[str, Compiled], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """The tiny model's packages, "windows": sinks of one block and windows, nothing else, and "routed" heads."""
    topologies = {
        "windows": window_topology(WINDOWS, num_layers=3, **SHAPE),
        "routed": routed_topology(),
    }
    root = tmp_path_factory.mktemp("packages")
    return compiled | {
        name: Compiled(topology, load(compile_package(topology, root / name, dtypes=("fp32",))))
        for name, topology in topologies.items()
    }


def generated(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, **arguments: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 40, "do_sample": False} | arguments
    output = model.generate(ids, attention_mask=mask, **settings)
    assert isinstance(output, torch.Tensor)
    return output


def live_blocks(topology: Topology, layer: int, length: int) -> int:
    """The blocks that a cache of one sequence of `length` tokens must hold in a layer, by the definition."""
    row, far = length // topology.block_size, length // topology.block_size + topology.num_blocks + 40
    mask = routing.may_read(topology, layer, far).numpy()[:, row:, : -(-length // topology.block_size)]
    return int(mask.reshape(topology.model.num_key_value_heads, -1, mask.shape[2]).any(axis=1).sum())


def held_blocks(cache: SurgeonCache, layer: int) -> int:
    pool = cache.layers[layer]._pool
    assert pool is not None
    return int((pool.table >= 0).sum())


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunked prefill": {"prefill_chunk_size": 24},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", ["dense", "sparse", "windows", "routed"])
def test_generate(model: LlamaForCausalLM, packages: dict[str, Compiled], name: str, how: str) -> None:
    ids, mask = padded((90, 61, 3))
    patch(model, packages[name].package, recall="pattern")
    torch.manual_seed(7)
    expected = generated(model, ids, mask, **GENERATIONS[how])
    torch.manual_seed(7)
    cache = SurgeonCache(packages[name].package)
    assert torch.equal(generated(model, ids, mask, **cache.argument, **GENERATIONS[how]), expected)
    assert cache.get_seq_length() == 90 + 39
    if how == "greedy" and name != "routed":  # what is chosen is no mask
        unpatch(model)
        assert torch.equal(expected, generated(masked_model(model, packages[name].topology), ids, mask))


@pytest.mark.parametrize("name", ["dense", "sparse", "windows", "routed"])
@pytest.mark.parametrize("lengths", [(1,), (16, 15), (75, 20), (130,)], ids=str)
def test_chunks_change_no_bit(
    model: LlamaForCausalLM, packages: dict[str, Compiled], name: str, lengths: tuple[int, ...]
) -> None:
    """Reads chunks of uneven lengths, some of them nothing but padding for the shorter sequence."""
    ids, mask = padded(lengths)
    patch(model, packages[name].package, recall="pattern")
    full, cache = DynamicCache(config=model.config), SurgeonCache(packages[name].package)
    steps = sorted({0, 1, 17, 18, 32, 60, 61, lengths[0] - 1, lengths[0]})
    for begin, end in itertools.pairwise(step for step in steps if 0 <= step <= lengths[0]):
        chunk, so_far = ids[:, begin:end], mask[:, :end]
        expected = model(chunk, attention_mask=so_far, past_key_values=full).logits
        assert torch.equal(model(chunk, attention_mask=so_far, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["dense", "sparse", "windows", "routed"])
def test_a_block_is_held_as_long_as_a_later_token_reads_it(
    model: LlamaForCausalLM, packages: dict[str, Compiled], name: str
) -> None:
    ids, topology = tokens(1, 160), packages[name].topology
    patch(model, packages[name].package, recall="pattern")
    cache = SurgeonCache(packages[name].package)
    for begin, end in itertools.pairwise((0, 47, 48, *range(49, 100), 141, 160)):
        model(ids[:, begin:end], past_key_values=cache)
        assert [held_blocks(cache, layer) for layer in range(3)] == [
            live_blocks(topology, layer, end) for layer in range(3)
        ]
    assert cache.full_bytes() == 3 * 2 * 160 * 2 * 32 * 4
    if name != "dense":
        assert cache.kept_bytes() < cache.full_bytes()


def test_windows_take_the_same_memory_at_every_length(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    """The memory stays the same far beyond the topology's 64 tokens."""
    patch(model, packages["windows"].package, recall="pattern")
    cache = SurgeonCache(packages["windows"].package)
    kept = []
    for begin in range(0, 480, BLOCK):
        model(tokens(2, BLOCK, seed=begin), past_key_values=cache)
        kept.append(cache.kept_bytes())
    blocks = sum(1 + max(pair) - 1 for pair in (WINDOWS[:2], WINDOWS[2:]))  # the sink, and the window's past
    held = 3 * 2 * blocks * 2 * BLOCK * 32 * 4  # layers, sequences, keys and values
    assert all(3 * held_blocks(cache, layer) * 2 * BLOCK * 32 * 4 == held for layer in range(3))
    spare = 3 * 2 * 2 * 2 * BLOCK * 32 * 4
    assert max(kept) <= 2 * (held + 2 * spare) + 3 * cache.layers[0]._pool.table.nbytes
    assert max(kept[-5:]) <= max(kept[5:10]) + 3 * cache.layers[0]._pool.table.nbytes
    assert cache.full_bytes() == 30 * 2 * 3 * 2 * 2 * BLOCK * 32 * 4


@pytest.mark.parametrize("name", ["sparse", "routed"])
def test_a_conversation_goes_on(model: LlamaForCausalLM, packages: dict[str, Compiled], name: str) -> None:
    patch(model, packages[name].package, recall="pattern")
    full, cache = DynamicCache(config=model.config), SurgeonCache(packages[name].package)
    ids = tokens(1, 33)
    for turn in range(3):
        mask = torch.ones_like(ids)
        expected = generated(model, ids, mask, past_key_values=full, max_new_tokens=21)
        assert torch.equal(generated(model, ids, mask, past_key_values=cache, max_new_tokens=21), expected)
        ids = torch.cat((expected, tokens(1, 30, seed=turn)), dim=1)
    assert cache.get_seq_length() == full.get_seq_length() == 3 * 20 + 33 + 2 * 31


def test_a_cached_prompt_is_copied(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    patch(model, packages["sparse"].package, recall="pattern")
    prompt = SurgeonCache(packages["sparse"].package)
    ids = tokens(1, 70)
    model(ids[:, :60], past_key_values=prompt)
    expected = generated(model, ids, torch.ones_like(ids))
    for _ in range(2):
        own = copy.deepcopy(prompt)
        assert torch.equal(generated(model, ids, torch.ones_like(ids), past_key_values=own), expected)
    assert prompt.get_seq_length() == 60


@pytest.mark.parametrize("name", ["sparse", "windows"])
def test_assisted_generation(model: LlamaForCausalLM, packages: dict[str, Compiled], name: str) -> None:
    """The assistant is wrong at nearly every token, so that the cache is cropped again and again."""
    ids = tokens(1, 40)
    patch(model, packages[name].package, recall="pattern")
    expected = generated(model, ids, torch.ones_like(ids))
    assistant = tiny_llama(tiny_config(num_hidden_layers=1), seed=1)
    cache = SurgeonCache(packages[name].package)
    found = generated(model, ids, torch.ones_like(ids), assistant_model=assistant, past_key_values=cache)
    assert torch.equal(found, expected)
    lookup = generated(
        model,
        ids,
        torch.ones_like(ids),
        prompt_lookup_num_tokens=3,
        past_key_values=SurgeonCache(packages[name].package),
    )
    assert torch.equal(lookup, expected)
    length = cache.get_seq_length()
    topology = packages[name].topology
    assert [held_blocks(cache, 0), held_blocks(cache, 1)] == [live_blocks(topology, layer, length) for layer in (0, 1)]


def test_cropping(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    patch(model, packages["windows"].package, recall="pattern")
    cache = SurgeonCache(packages["windows"].package)
    ids = tokens(1, 100)
    expected = model(ids).logits
    model(ids[:, :75], past_key_values=cache)
    cache.crop(-5)  # within the next token's row: nothing that it reads was dropped
    assert cache.get_seq_length() == 70
    torch.testing.assert_close(model(ids[:, 70:], past_key_values=cache).logits, expected[:, 70:], atol=2e-5, rtol=0)
    before = cache.kept_bytes(), cache.get_seq_length()
    with pytest.raises(
        PatchError, match=r"expected to go back to a token that reads no block that layer 0 has dropped"
    ):
        cache.crop(-60)
    assert (cache.kept_bytes(), cache.get_seq_length()) == before
    with pytest.raises(PatchError, match=r"SurgeonCache.crop: expected minus the number of tokens to remove, got 40"):
        cache.crop(40)

    cache.reset()
    cache.activate_past_recording()
    model(ids[:, :95], past_key_values=cache)
    cache.crop(-60)
    assert held_blocks(cache, 0) == live_blocks(packages["windows"].topology, 0, 35)
    torch.testing.assert_close(model(ids[:, 35:], past_key_values=cache).logits, expected[:, 35:], atol=2e-5, rtol=0)
    cache.crop(-100)
    assert cache.kept_bytes() == cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, atol=2e-5, rtol=0)


def test_what_routed_heads_choose_by_is_cropped_too(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    """Tokens that replace cropped ones have nodes of their own."""
    patch(model, packages["routed"].package)
    full, cache = DynamicCache(config=model.config), SurgeonCache(packages["routed"].package)
    cache.activate_past_recording()
    ids, others = tokens(1, 120), tokens(1, 60, seed=9)
    for each in (full, cache):
        model(ids[:, :90], past_key_values=each)
        model(ids[:, 90:], past_key_values=each)  # writes the nodes of all 120 tokens
    full.crop(-59)
    cache.crop(-59)
    for begin, end in itertools.pairwise((0, 30, *range(31, 60))):
        part = others[:, begin:end]
        expected = model(part, past_key_values=full).logits
        assert torch.equal(model(part, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["sparse", "routed"])
def test_sequences_are_chosen_and_repeated(model: LlamaForCausalLM, packages: dict[str, Compiled], name: str) -> None:
    patch(model, packages[name].package, recall="pattern")
    ids, mask = padded((70, 50, 33))
    full, cache = DynamicCache(config=model.config), SurgeonCache(packages[name].package)
    for each in (full, cache):
        model(ids, attention_mask=mask, past_key_values=each)
        each.batch_select_indices(torch.tensor([2, 0]))
        each.batch_repeat_interleave(2)
        each.reorder_cache(torch.tensor([3, 0, 1, 1]))
    rows = torch.tensor([0, 2, 2, 2])
    longer = torch.cat((mask[rows], torch.ones(4, 20, dtype=torch.int64)), dim=1)
    more = tokens(4, 20)
    expected = model(more, attention_mask=longer, past_key_values=full).logits
    assert torch.equal(model(more, attention_mask=longer, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    package = load(compile_package(sparse_topology(), tmp_path / "kernels", dtypes=(name,)), strict=True)
    model = tiny_llama().to(dtype)
    ids, mask = padded((90, 61))
    patch(model, package, recall="pattern")
    cache = SurgeonCache(package)
    expected = generated(model, ids, mask)
    assert torch.equal(generated(model, ids, mask, past_key_values=cache), expected)
    assert cache.full_bytes() == 3 * 2 * 2 * 129 * 2 * 32 * 2


def test_a_dtype_that_runs_in_a_wider_one(
    model: LlamaForCausalLM, packages: dict[str, Compiled], tmp_path: Path
) -> None:
    package = load(compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",)))
    model = model.bfloat16()
    ids, mask = padded((40, 25))
    patch(model, package, recall="pattern")
    expected = generated(model, ids, mask)
    assert torch.equal(generated(model, ids, mask, past_key_values=SurgeonCache(package)), expected)


def test_under_autocast(model: LlamaForCausalLM, packages: dict[str, Compiled], tmp_path: Path) -> None:
    patch(model, load(compile_package(sparse_topology(), tmp_path / "kernels")), recall="pattern")
    ids, mask = padded((40, 25))
    cache = SurgeonCache(packages["sparse"].package)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generated(model, ids, mask)
        assert torch.equal(generated(model, ids, mask, past_key_values=cache), expected)


def test_dense_beyond_the_topology_drops_nothing(model: LlamaForCausalLM, tmp_path: Path) -> None:
    topology = sparse_topology(beyond="dense")
    package = load(compile_package(topology, tmp_path / "kernels", dtypes=("fp32",)))
    patch(model, package, recall="pattern")
    ids, mask = padded((90, 61))
    cache = SurgeonCache(package)
    assert torch.equal(generated(model, ids, mask, past_key_values=cache), generated(model, ids, mask))
    assert held_blocks(cache, 0) == 2 * (9 + 7)  # of 129 and of 100 tokens, in two KV heads
    assert cache.kept_bytes() < 1.5 * cache.full_bytes()


def test_beyond_an_error(model: LlamaForCausalLM, tmp_path: Path) -> None:
    package = load(compile_package(sparse_topology(beyond="error"), tmp_path / "kernels", dtypes=("fp32",)))
    patch(model, package, recall="pattern")
    ids, cache = tokens(1, 65), SurgeonCache(package)
    expected = model(ids[:, :64]).logits
    found = [model(part, past_key_values=cache).logits for part in (ids[:, :50], ids[:, 50:64])]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=0)
    with pytest.raises(TopologyError, match="beyond: error"):
        model(ids[:, 64:], past_key_values=cache)


def test_some_of_the_heads(packages: dict[str, Compiled]) -> None:
    """Each process of a tensor-parallel model caches its own heads."""
    package, topology = packages["sparse"].package, packages["sparse"].topology
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 130, 32, generator=generator) for heads in (4, 2, 2))
    held = []
    for head in range(2):
        part, layer = package.part(range(head, head + 1)), SurgeonCache(package).layers[2]
        q_, k_, v_ = q[:, 2 * head : 2 * head + 2], k[:, head : head + 1], v[:, head : head + 1]
        for begin, end in itertools.pairwise((0, 33, 34, 90, 91, 130)):
            new = (tensor[:, :, begin:end] for tensor in (q_, k_, v_))
            found = layer.attend(Operands(*new, torch.tensor([begin]), torch.tensor([0]), 0.2), part)
            assert torch.equal(found, part.attention(2, q_[:, :, begin:end], k_[:, :, :end], v_[:, :, :end], 0.2))
        held.append(int((layer._pool.table >= 0).sum()))
    assert sum(held) == live_blocks(topology, 2, 130)
    assert held[0] != held[1]


# Refusals


def test_no_other_attention_takes_what_is_held(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    ids = tokens(1, 20)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(PatchError, match=r"expected a SurgeonCache in a model that is patched.*patch\(model, pack"):
            model(ids, past_key_values=SurgeonCache(packages["sparse"].package))


def test_unpatched_in_between(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    patch(model, packages["sparse"].package, recall="pattern")
    ids, cache = tokens(1, 40), SurgeonCache(packages["sparse"].package)
    model(ids[:, :30], past_key_values=cache)
    unpatch(model)
    with pytest.raises(PatchError, match="one whose keys and values another attention reads"):
        model(ids[:, 30:], past_key_values=cache)


def test_the_cache_of_another_topology(model: LlamaForCausalLM, packages: dict[str, Compiled]) -> None:
    patch(model, packages["sparse"].package, recall="pattern")
    with pytest.raises(PatchError, match="SurgeonCache: layer 0: expected a model patched with its package"):
        model(tokens(1, 20), past_key_values=SurgeonCache(packages["windows"].package))


def test_keys_on_a_gpu(packages: dict[str, Compiled]) -> None:
    keys = on_gpu(torch.zeros(1, 2, 4, 32))
    with pytest.raises(
        PatchError, match="expected keys and values on the CPU, got those on cuda:0; use a DynamicCache"
    ):
        SurgeonCache(packages["sparse"].package).update(keys, keys, 0)


def attending(layer: PagedLayer, package: Package, length: int, position: list[int], cache_leftpad: list[int]) -> None:
    keys = torch.zeros(len(position), 2, length, 32)
    query = torch.zeros(len(position), 4, length, 32)
    layer.attend(Operands(query, keys, keys, torch.tensor(position), torch.tensor(cache_leftpad), 0.2), package)


def wrong_position(layer: PagedLayer, package: Package) -> None:
    attending(layer, package, 3, [20, 19], [0, 4])


def other_padding(layer: PagedLayer, package: Package) -> None:
    attending(layer, package, 3, [20, 20], [0, 5])


def less_padding(layer: PagedLayer, package: Package) -> None:
    layer.reset()
    attending(layer, package, 20, [0, 0], [0, 20])
    attending(layer, package, 3, [20, 20], [0, 18])


def other_batch(layer: PagedLayer, package: Package) -> None:
    attending(layer, package, 3, [20], [0])


def other_dtype(layer: PagedLayer, package: Package) -> None:
    keys = torch.zeros(2, 2, 1, 32, dtype=torch.bfloat16)
    layer.attend(Operands(keys, keys, keys, torch.tensor([20, 20]), torch.tensor([0, 4]), 0.2), package)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wrong_position, r"layer 1: expected tokens from position 20 on, as many as the cache has, got .*\[20, 19\]"),
        (other_padding, r"layer 1: expected the padding of the first call, \[0, 4\] tokens, got \[0, 5\]"),
        (less_padding, r"layer 1: expected the padding of the first call, \[0, 20\] tokens, got \[0, 18\]"),
        (other_batch, "layer 1: expected 2 sequences, got 1"),
        (other_dtype, "layer 1: expected torch.float32, as before, got torch.bfloat16"),
    ],
)
def test_what_does_not_follow_is_refused(
    packages: dict[str, Compiled], call: Callable[[PagedLayer, Package], None], message: str
) -> None:
    package = packages["sparse"].package
    layer = SurgeonCache(package).layers[1]
    attending(layer, package, 20, [0, 0], [0, 4])
    with pytest.raises(PatchError, match=message):
        call(layer, package)
    attending(layer, package, 3, [20, 20], layer._cache_leftpad)
    assert layer.get_seq_length() == 23
