"""A patched model equals the model under the topology's mask, and an unpatched one is the original again."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from models import Compiled, attributes, masked_model, padded, sparse_topology, tiny_config, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import Package, SurgeonCache, fingerprint, load, patch, trace, unpatch
from surgeon.runtime.errors import PackageError, PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")

LENGTHS = (70, 41, 5)  # in blocks of 16: beyond the topology's four, in the middle of a block, shorter than one
TOLERANCE = 2e-5  # of fp32 logits whose largest are about 10


def logits(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **arguments: Any
) -> torch.Tensor:
    """The logits at tokens that are not padding, `[tokens, vocabulary]`."""
    found: torch.Tensor = model(ids, attention_mask=mask, **arguments).logits
    return found.flatten(0, 1) if mask is None else found[mask.bool()[:, -ids.shape[1] :]]


def generated(
    model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int = 32, **arguments: Any
) -> torch.Tensor:
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **arguments)
    assert isinstance(output, torch.Tensor)
    assert output.shape[1] == ids.shape[1] + new_tokens
    return output


def reference(model: LlamaForCausalLM, name: str, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    """The reference for the model patched with the named package: itself, or itself under the explicit mask."""
    return masked_model(model, compiled[name].topology) if name == "sparse" else copy.deepcopy(model)


@pytest.mark.parametrize("name", ["dense", "one cluster", "sparse"])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (16, 15), (130,)], ids=str)
def test_logits(model: LlamaForCausalLM, compiled: dict[str, Compiled], name: str, lengths: tuple[int, ...]) -> None:
    ids, mask = padded(lengths)
    expected = logits(reference(model, name, compiled), ids, mask)
    patch(model, compiled[name].package, recall="pattern")
    torch.testing.assert_close(logits(model, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_logits_without_a_mask(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids = tokens(2, 50)
    expected = logits(reference(model, "sparse", compiled), ids)
    patch(model, compiled["sparse"].package, recall="pattern")
    torch.testing.assert_close(logits(model, ids), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(model, ids, use_cache=False), expected, atol=TOLERANCE, rtol=0)


def test_sparse_is_not_dense(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    """Guards the other tests: these weights and masks make a difference that those would notice."""
    ids, mask = padded(LENGTHS)
    dense = logits(model, ids, mask)
    patch(model, compiled["sparse"].package, recall="pattern")
    assert (logits(model, ids, mask) - dense).abs().max() > 1e4 * TOLERANCE


def test_left_padding_changes_nothing(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(model, compiled["sparse"].package, recall="pattern")
    ids, mask = padded(LENGTHS)
    together = logits(model, ids, mask)
    alone = [logits(model, ids[i : i + 1, -length:]) for i, length in enumerate(LENGTHS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_right_padding_changes_nothing_before_it(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids = tokens(2, 40)
    patch(model, compiled["sparse"].package, recall="pattern")
    expected = logits(model, ids[:1, :23])
    mask = torch.ones_like(ids)
    mask[0, 23:] = 0
    torch.testing.assert_close(logits(model, ids, mask)[:23], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["dense", "one cluster", "sparse"])
def test_generate(model: LlamaForCausalLM, compiled: dict[str, Compiled], name: str, cache: str | None) -> None:
    ids, mask = padded((50, 33, 3))
    expected = generated(reference(model, name, compiled), ids, mask)
    patch(model, compiled[name].package, recall="pattern")
    assert torch.equal(generated(model, ids, mask, cache_implementation=cache), expected)


@pytest.mark.parametrize("arguments", [{"prefill_chunk_size": 16}, {"num_beams": 3, "new_tokens": 8}], ids=str)
def test_generate_in_other_ways(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], arguments: dict[str, Any]
) -> None:
    ids, mask = padded((50, 33, 3))
    expected = generated(masked_model(model, compiled["sparse"].topology), ids, mask, **arguments)
    patch(model, compiled["sparse"].package, recall="pattern")
    assert torch.equal(generated(model, ids, mask, **arguments), expected)


@pytest.mark.parametrize("static", [False, True])
def test_chunked_prefill_and_decode(model: LlamaForCausalLM, compiled: dict[str, Compiled], static: bool) -> None:
    """Reads chunks of uneven lengths, the first of them nothing but padding for the shorter sequence."""
    ids, mask = padded((75, 20))
    expected = masked_model(model, compiled["sparse"].topology)(ids, attention_mask=mask).logits
    patch(model, compiled["sparse"].package, recall="pattern")
    cache: Cache = StaticCache(model.config, max_cache_len=90) if static else DynamicCache(config=model.config)
    chunks = []
    for begin, end in ((0, 17), (17, 60), (60, 61), (61, 74), (74, 75)):
        chunks.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    found = torch.cat(chunks, dim=1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)


def test_a_mask_of_the_whole_static_cache(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded((40, 20))
    patch(model, compiled["sparse"].package, recall="pattern")
    expected = logits(model, ids, mask)
    longer = torch.cat((mask, torch.ones(2, 24, dtype=torch.int64)), dim=1)
    cache = StaticCache(model.config, max_cache_len=64)
    found = model(ids, attention_mask=longer, past_key_values=cache).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_under_torch_compile(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    patch(model, compiled["sparse"].package, recall="pattern")
    expected = logits(model, ids, mask)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(whole, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_two_models_of_one_config(compiled: dict[str, Compiled]) -> None:
    config = tiny_config()
    first, second = tiny_llama(config), tiny_llama(config)
    ids, mask = padded(LENGTHS)
    expected = logits(second, ids, mask)
    patch(first, compiled["sparse"].package, recall="pattern")
    assert torch.equal(logits(second, ids, mask), expected)
    assert not torch.allclose(logits(first, ids, mask), expected, atol=0.1)
    assert config._attn_implementation == "sdpa"
    patch(second, compiled["dense"].package, recall="pattern")
    assert not torch.allclose(logits(first, ids, mask), logits(second, ids, mask), atol=0.1)
    unpatch(first)
    torch.testing.assert_close(logits(second, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_unpatch_restores_everything(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    expected = logits(model, ids, mask)
    config, settings, before = model.config, model.config.to_dict(), attributes(model)
    patch(model, compiled["sparse"].package, recall="pattern")
    assert model.config is not config
    assert model.model.layers[0].self_attn.config is model.config
    unpatch(model)
    assert model.config is config
    assert config.to_dict() == settings
    after = attributes(model)
    assert after == before
    assert all(after[name][key] is value for name, held in before.items() for key, value in held.items())
    assert torch.equal(logits(model, ids, mask), expected)


def test_weights_are_neither_copied_nor_changed(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    hashed = fingerprint(model)
    patch(model, compiled["sparse"].package, recall="pattern")
    generated(model, *padded((9, 4)), new_tokens=3)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, (parameter, _) in before.items())
    assert all(after[name].data_ptr() == address for name, (_, address) in before.items())
    assert fingerprint(model) == hashed


def test_a_copy_of_a_patched_model(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    dense = logits(model, ids, mask)
    patch(model, compiled["sparse"].package, recall="pattern")
    other = copy.deepcopy(model)
    unpatch(model)
    assert not torch.allclose(logits(other, ids, mask), dense, atol=0.1)
    unpatch(other)
    assert torch.equal(logits(other, ids, mask), dense)


def test_a_patched_model_keeps_its_package_loaded(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The package stays loaded even after another load of it came and went."""
    ids, mask = padded(LENGTHS)
    folder = compile_package(sparse_topology(beyond="dense"), tmp_path / "kernels", dtypes=("fp32",))
    expected = logits(masked_model(model, sparse_topology(beyond="dense")), ids, mask)
    patch(model, load(folder), recall="pattern")
    load(folder)
    gc.collect()
    torch.testing.assert_close(logits(model, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_a_folder_is_loaded(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    folder = compiled["sparse"].package._files.folder
    expected = patched_logits(model, compiled["sparse"].package)
    torch.testing.assert_close(patched_logits(model, str(folder)), expected, atol=0, rtol=0)
    torch.testing.assert_close(trace(model, folder, recall="pattern")(tokens(1, 70)), expected, atol=1e-4, rtol=1e-4)
    patch(model, folder, recall="pattern")
    try:
        cache = SurgeonCache(folder)
        found = model(tokens(1, 70), past_key_values=cache).logits
    finally:
        unpatch(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def patched_logits(model: LlamaForCausalLM, package: Package | str) -> torch.Tensor:
    patch(model, package, recall="pattern")
    try:
        logits: torch.Tensor = model(tokens(1, 70)).logits
    finally:
        unpatch(model)
    return logits


@pytest.mark.parametrize("package", [None, 3, sparse_topology()])
def test_what_is_no_package_is_refused(model: LlamaForCausalLM, package: Any) -> None:
    for into in (patch, trace):
        with pytest.raises(PatchError, match=r"package: expected a package or its folder, got a .*; pass surgeon"):
            into(model, package)
    with pytest.raises(PackageError, match="expected a package folder, got nothing"):
        patch(model, "no/such/folder")


def test_a_model_in_the_place_of_the_package_is_told(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    with pytest.raises(PatchError, match="expected a package or its folder, got a LlamaForCausalLM"):
        patch(compiled["sparse"].package, model)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="model: expected a PreTrainedModel of Transformers, got a str"):
        patch("path/to/llama", compiled["sparse"].package)  # type: ignore[arg-type]
