"""Dense recall: prompts follow the topology, but their last rows and decoding read everything."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, StaticCache
from transformers.generation.utils import GenerationMixin

from models import Compiled, masked_model, padded, sparse_topology, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import Package, SurgeonCache, load, patch, serving_program, trace, unpatch
from surgeon.runtime.errors import PatchError
from surgeon.runtime.transformers import paged_layer, recall

pytestmark = pytest.mark.usefixtures("no_gradients")

ROWS = 20
"""Of a prompt of 150 tokens in blocks of 16, those from token 128 on then read everything."""


@pytest.fixture(scope="module")
def package(compiled: dict[str, Compiled]) -> Package:
    return compiled["sparse"].package


@pytest.fixture
def patched(package: Package) -> LlamaForCausalLM:
    model = tiny_llama()
    patch(model, package, dense_rows=ROWS)
    return model


@pytest.fixture
def expected(compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    return masked_model(tiny_llama(), compiled["sparse"].topology, ROWS)


def generated(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, **how: Any) -> torch.Tensor:
    output = model.generate(ids, attention_mask=mask, **({"max_new_tokens": 24, "do_sample": False} | how))
    assert isinstance(output, torch.Tensor)
    return output


def test_logits_of_a_prompt(patched: LlamaForCausalLM, expected: LlamaForCausalLM, package: Package) -> None:
    ids, mask = padded((150, 97, 30))
    found, wanted = (model(ids, attention_mask=mask).logits for model in (patched, expected))
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=1e-3, atol=1e-3)
    forgetful = tiny_llama()
    patch(forgetful, package, recall="pattern")
    assert not torch.allclose(forgetful(ids, attention_mask=mask).logits[:, -1], found[:, -1], atol=1e-2)
    traced = trace(tiny_llama(), package, dense_rows=ROWS)(ids, mask)
    torch.testing.assert_close(traced[mask == 1], found[mask == 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False, "max_new_tokens": 8},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 140},
        {"prefill_chunk_size": 61, "cache_implementation": "static"},
        {"prefill_chunk_size": 33, "num_beams": 2},
    ],
    ids=str,
)
def test_every_way_to_generate(patched: LlamaForCausalLM, expected: LlamaForCausalLM, how: dict[str, Any]) -> None:
    ids, mask = padded((150, 97, 30))
    whole = {name: value for name, value in how.items() if name != "prefill_chunk_size"}
    assert torch.equal(generated(patched, ids, mask, **how), generated(expected, ids, mask, **whole))
    assert recall._PROMPT_END.get() is None


def test_chunks_outside_generate_each_have_an_end(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    """Nobody says there that the prompt goes on, so that a chunk's last rows read everything."""
    ids, caches = tokens(1, 150), [None, None]
    for begin, end in ((0, 90), (90, 150)):
        outputs = [
            model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            for model, cache in zip((patched, expected), caches, strict=True)
        ]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-3, atol=1e-3)
        caches = [output.past_key_values for output in outputs]


def test_a_later_turn(patched: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    """A question after the prompt reads all of it, whichever cache holds it and however it is cut."""
    ids, (prompt, turn) = tokens(2, 190), (150, 190)
    answers = []
    for model, chunk in ((expected, None), (patched, None), (patched, 13)):
        cache = StaticCache(model.config, max_cache_len=256)
        model(ids[:, :prompt], past_key_values=cache)
        answers.append(
            generated(model, ids[:, :turn], torch.ones(2, turn).long(), past_key_values=cache, prefill_chunk_size=chunk)
        )
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("chunk", [None, 24])
def test_a_surgeon_cache_keeps_everything_and_says_so_once(
    patched: LlamaForCausalLM, package: Package, caplog: pytest.LogCaptureFixture, chunk: int | None
) -> None:
    paged_layer._say_once.cache_clear()
    ids, mask = padded((150, 97))
    wanted = generated(patched, ids, mask)
    with caplog.at_level(logging.WARNING, "surgeon"):
        for _ in range(2):
            cache = SurgeonCache(package)
            found = generated(patched, ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
            assert torch.equal(found, wanted)
    assert [record.message for record in caplog.records if "keeps every block" in record.message] == [
        'recall is dense, so a SurgeonCache keeps every block; patch(model, package, recall="pattern") lets it drop '
        "those that the topology's later rows do not read"
    ]
    assert all((layer._pool.table[0] >= 0).sum() == 2 * 11 for layer in cache.layers)  # 173 tokens in two KV heads
    cache.crop(-30)  # to a token whose far blocks would be gone under the pattern
    mask = torch.cat((mask, mask.new_ones(2, 24)), dim=1)[:, :144]
    logits = patched(wanted[:, 143:144], attention_mask=mask, past_key_values=cache).logits
    whole = patched(wanted[:, :143], attention_mask=mask[:, :143]).past_key_values
    again = patched(wanted[:, 143:144], attention_mask=mask, past_key_values=whole).logits
    assert torch.isfinite(logits).all()
    assert logits.shape == again.shape
    assert cache.get_seq_length() == 144


def test_a_cache_that_has_dropped_blocks_is_refused(patched: LlamaForCausalLM, package: Package) -> None:
    cache, ids = SurgeonCache(package), tokens(1, 150)
    unpatch(patched)
    patch(patched, package, recall="pattern")
    patched(ids, past_key_values=cache)
    unpatch(patched)
    patch(patched, package)
    with pytest.raises(PatchError, match="a block that the cache has dropped"):
        patched(ids[:, :1], past_key_values=cache)


def test_a_serving_program(patched: LlamaForCausalLM, package: Package) -> None:
    ids, kept = tokens(1, 150), torch.tensor([149])
    shape = (1, 2, 160, 32)
    keys, values = ([torch.zeros(shape) for _ in range(3)] for _ in range(2))
    step = serving_program(patched).module()
    prompt = step(ids, torch.tensor([0]), kept, keys, values)
    torch.testing.assert_close(prompt[:, 0], patched(ids).logits[:, -1], rtol=1e-3, atol=1e-3)
    token = tokens(1, 1, seed=5)
    cache = patched(ids, use_cache=True).past_key_values
    found = step(token, torch.tensor([150]), torch.tensor([0]), keys, values)
    torch.testing.assert_close(found, patched(token, past_key_values=cache).logits, rtol=1e-3, atol=1e-3)


def test_unpatch_and_copies(patched: LlamaForCausalLM, expected: LlamaForCausalLM, package: Package) -> None:
    ids, mask = padded((150, 97))
    wanted = generated(expected, ids, mask)
    copied = copy.deepcopy(patched)
    assert vars(copied)["_prefill"].__self__ is copied
    unpatch(patched)
    assert "_prefill" not in vars(patched)
    assert patched._prefill.__func__ is GenerationMixin._prefill
    assert torch.equal(generated(patched, ids, mask), generated(tiny_llama(), ids, mask))
    assert torch.equal(generated(copied, ids, mask, prefill_chunk_size=20), wanted)
    patch(patched, package, recall="pattern")
    assert "_prefill" not in vars(patched)


def test_an_error_while_prefilling_forgets_the_prompt(patched: LlamaForCausalLM) -> None:
    with pytest.raises(PatchError, match="masked keys between valid ones"):
        generated(patched, tokens(1, 40), torch.tensor([[1, 0] * 20]), prefill_chunk_size=16)
    assert recall._PROMPT_END.get() is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"recall": "all"}, 'recall: expected "dense" or "pattern", got \'all\''),
        ({"recall": 1}, 'recall: expected "dense" or "pattern", got 1'),
        ({"dense_rows": -1}, "dense_rows: expected a whole number of tokens from 1 on, got -1"),
        ({"dense_rows": 0}, "dense_rows: expected a whole number of tokens from 1 on, got 0"),
        ({"dense_rows": 12.0}, "dense_rows: expected a whole number of tokens from 1 on, got 12.0"),
        ({"dense_rows": True}, "dense_rows: expected a whole number of tokens from 1 on, got True"),
    ],
)
def test_what_is_refused(package: Package, arguments: dict[str, Any], text: str) -> None:
    model = tiny_llama()
    for put in (patch, trace):
        with pytest.raises(PatchError) as raised:
            put(model, package, **arguments)
        assert str(raised.value).startswith(text)
    assert "_surgeon_patch" not in vars(model)


def test_a_collapsed_topology_is_the_dense_model(compiled: dict[str, Compiled]) -> None:
    ids, mask = padded((150, 97))
    model = tiny_llama()
    patch(model, compiled["dense"].package)
    wanted = tiny_llama()(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask == 1], wanted[mask == 1], rtol=1e-3, atol=1e-3
    )


def test_more_rows_than_a_prompt_has_are_the_dense_model(tmp_path: Path) -> None:
    package = load(compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",)))
    model, ids = tiny_llama(), tokens(1, 100)
    patch(model, package, dense_rows=100)
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, rtol=1e-3, atol=1e-3)
