"""The equivalences of Transformers' own attentions also hold on the kernels of a collapsed topology.

They are modelled on the checks that Transformers makes of its own attentions and caches for each model.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from models import Compiled, padded, tiny_llama, tokens
from surgeon.runtime import patch, unpatch

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10


@pytest.fixture(params=["dense", "one cluster"])
def patched(request: pytest.FixtureRequest, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    model = tiny_llama()
    patch(model, compiled[request.param].package, recall="pattern")
    return model


def own(implementation: str) -> LlamaForCausalLM:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "no mask", "left", "right"])
def test_inference_equals(patched: LlamaForCausalLM, implementation: str, padding: str) -> None:
    """The hidden states of every layer and the logits, at every token that is not padding."""
    ids, mask = padded((70, 41, 5))
    arguments: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    if padding == "right":
        ids, arguments["attention_mask"] = ids.flip(1), mask.flip(1)
    elif padding != "left":
        ids = tokens(3, 70)
        arguments["attention_mask"] = torch.ones_like(ids) if padding == "none" else None
    real = ids != 0
    found, expected = (model(ids, **arguments) for model in (patched, own(implementation)))
    close(found.logits[real], expected.logits[real])
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours[real], theirs[real])


def test_a_batch_is_its_rows(patched: LlamaForCausalLM) -> None:
    ids = tokens(5, 67)
    together = patched(ids).logits
    for row in range(5):
        close(together[row : row + 1], patched(ids[row : row + 1]).logits)
    close(together[1:3], patched(ids[1:3]).logits)  # a smaller batch after a larger one


def test_left_padding_of_any_width_changes_nothing(patched: LlamaForCausalLM) -> None:
    ids = tokens(1, 37)
    expected = patched(ids).logits
    for width in (1, 15, 16, 50):
        mask = torch.cat((torch.zeros(1, width), torch.ones(1, 37)), dim=1).long()
        longer = torch.cat((torch.zeros(1, width, dtype=torch.int64), ids), dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        close(patched(longer, attention_mask=mask, position_ids=positions).logits[:, width:], expected)
        close(patched(longer, attention_mask=mask).logits[:, width:], expected)  # rotary positions are relative


def test_embeddings_in_place_of_tokens(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((30, 12))
    embeddings = patched.get_input_embeddings()(ids)
    close(patched(inputs_embeds=embeddings, attention_mask=mask).logits, patched(ids, attention_mask=mask).logits)
    found = patched.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, patched.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, 30:])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("given", ["mask", "no mask", "positions"])
def test_a_cache_equals_a_call_without(patched: LlamaForCausalLM, static: bool, given: str) -> None:
    """Reads the tokens in one call, then in chunks of several tokens and of one."""
    ids, mask = padded((64, 64) if given == "no mask" else (64, 20))
    expected = own("sdpa")(ids, attention_mask=mask, use_cache=False).logits
    cache: Cache = StaticCache(patched.config, max_cache_len=80) if static else DynamicCache(config=patched.config)
    parts = []
    for begin, end in ((0, 31), (31, 47), (47, 48), (48, 49), (49, 64)):
        arguments: dict[str, Any] = {} if given == "no mask" else {"attention_mask": mask[:, :end]}
        if given == "positions":
            arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, begin:end]
        parts.append(patched(ids[:, begin:end], past_key_values=cache, **arguments).logits)
    close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])


def test_static_dynamic_and_no_cache_generate_alike(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((40, 18))
    how: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    model = own("eager")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for arguments in how:
        found = patched.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **arguments)
        assert torch.equal(found, expected)


def test_a_cache_serves_both_attentions(patched: LlamaForCausalLM) -> None:
    """A cache that one model has filled serves the other."""
    model, ids = own("sdpa"), tokens(2, 60)
    expected = model(ids).logits[:, 45:]
    for first, second in ((model, patched), (patched, model)):
        cache = first(ids[:, :45]).past_key_values
        close(second(ids[:, 45:], past_key_values=cache).logits, expected)


def test_a_cache_whose_batch_is_repeated_and_selected(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((40, 18))
    expected = patched(ids, attention_mask=mask).logits[:, -1]
    cache = patched(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 0, 1]))
    order = [1, 0, 0]
    found = patched(ids[order, -1:], attention_mask=mask[order], past_key_values=cache).logits[:, -1]
    close(found, expected[order])


def test_a_cropped_cache_goes_on(patched: LlamaForCausalLM) -> None:
    ids = tokens(2, 60)
    cache = patched(ids[:, :50]).past_key_values
    cache.crop(33 - 50)
    close(patched(ids[:, 33:], past_key_values=cache).logits, patched(ids).logits[:, 33:])


def test_only_the_last_logits(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((40, 18))
    found = patched(ids, attention_mask=mask, logits_to_keep=1).logits
    close(found, patched(ids, attention_mask=mask).logits[:, -1:])


def test_the_loss_is_the_models(patched: LlamaForCausalLM) -> None:
    ids, mask = padded((40, 18))
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 40 - 18] = -100  # its first token, predicted by padding
    found, expected = (model(ids, attention_mask=mask, labels=labels).loss for model in (patched, own("eager")))
    close(found, expected)


def test_saved_and_loaded_it_is_the_unpatched_model(patched: LlamaForCausalLM, tmp_path: Path) -> None:
    patched.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert "surgeon" not in (tmp_path / "config.json").read_text()
    ids = tokens(2, 40)
    assert torch.equal(loaded(ids).logits, own("sdpa")(ids).logits)


def test_patched_and_unpatched_again_and_again(patched: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids = tokens(2, 40)
    first = patched(ids).logits
    for _ in range(2):
        copied = copy.deepcopy(patched)
        unpatch(copied)
        assert torch.equal(copied(ids).logits, own("sdpa")(ids).logits)
        patch(copied, compiled["dense"].package, recall="pattern")
        close(copied(ids).logits, first)
