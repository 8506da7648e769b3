"""A patched model is the model run under the topology's mask, or says why it will not run."""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from gpu_standin import on_gpu
from models import Compiled, masked_model, padded, sparse_topology, tiny_config, tiny_llama, tokens
from surgeon.compiler import compile_package
from surgeon.runtime import Package, fingerprint, load, patch, unpatch
from surgeon.runtime.errors import PatchError

LENGTHS = (70, 41, 5)  # in blocks of 16: beyond the topology's four, in the middle of a block, shorter than one
TOLERANCE = 2e-5  # of fp32 logits whose largest are about 10


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _no_grad(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **arguments: Any
) -> torch.Tensor:
    """The logits at tokens that are no padding, `[tokens, vocabulary]`."""
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
    """What the model patched with the named package must equal: itself, or itself under the explicit mask."""
    return masked_model(model, compiled[name].topology) if name == "sparse" else copy.deepcopy(model)


@pytest.mark.parametrize("name", ["dense", "one cluster", "sparse"])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (16, 15), (130,)], ids=str)
def test_logits(model: LlamaForCausalLM, compiled: dict[str, Compiled], name: str, lengths: tuple[int, ...]) -> None:
    ids, mask = padded(lengths)
    expected = logits(reference(model, name, compiled), ids, mask)
    patch(model, compiled[name].package)
    torch.testing.assert_close(logits(model, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_logits_without_a_mask(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids = tokens(2, 50)
    expected = logits(reference(model, "sparse", compiled), ids)
    patch(model, compiled["sparse"].package)
    torch.testing.assert_close(logits(model, ids), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(model, ids, use_cache=False), expected, atol=TOLERANCE, rtol=0)


def test_sparse_is_not_dense(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    """Guards the other tests: these weights and masks make a difference that they would notice."""
    ids, mask = padded(LENGTHS)
    dense = logits(model, ids, mask)
    patch(model, compiled["sparse"].package)
    assert (logits(model, ids, mask) - dense).abs().max() > 1e4 * TOLERANCE


def test_left_padding_changes_nothing(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(model, compiled["sparse"].package)
    ids, mask = padded(LENGTHS)
    together = logits(model, ids, mask)
    alone = [logits(model, ids[i : i + 1, -length:]) for i, length in enumerate(LENGTHS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_right_padding_changes_nothing_before_it(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids = tokens(2, 40)
    patch(model, compiled["sparse"].package)
    expected = logits(model, ids[:1, :23])
    mask = torch.ones_like(ids)
    mask[0, 23:] = 0
    torch.testing.assert_close(logits(model, ids, mask)[:23], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["dense", "one cluster", "sparse"])
def test_generate(model: LlamaForCausalLM, compiled: dict[str, Compiled], name: str, cache: str | None) -> None:
    ids, mask = padded((50, 33, 3))
    expected = generated(reference(model, name, compiled), ids, mask)
    patch(model, compiled[name].package)
    assert torch.equal(generated(model, ids, mask, cache_implementation=cache), expected)


@pytest.mark.parametrize("arguments", [{"prefill_chunk_size": 16}, {"num_beams": 3, "new_tokens": 8}], ids=str)
def test_generate_in_other_ways(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], arguments: dict[str, Any]
) -> None:
    ids, mask = padded((50, 33, 3))
    expected = generated(masked_model(model, compiled["sparse"].topology), ids, mask, **arguments)
    patch(model, compiled["sparse"].package)
    assert torch.equal(generated(model, ids, mask, **arguments), expected)


@pytest.mark.parametrize("static", [False, True])
def test_chunked_prefill_and_decode(model: LlamaForCausalLM, compiled: dict[str, Compiled], static: bool) -> None:
    """Chunks of uneven lengths, the first of them nothing but padding for the shorter sequence."""
    ids, mask = padded((75, 20))
    expected = masked_model(model, compiled["sparse"].topology)(ids, attention_mask=mask).logits
    patch(model, compiled["sparse"].package)
    cache: Cache = StaticCache(model.config, max_cache_len=90) if static else DynamicCache(config=model.config)
    chunks = []
    for begin, end in ((0, 17), (17, 60), (60, 61), (61, 74), (74, 75)):
        chunks.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    found = torch.cat(chunks, dim=1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)


def test_a_mask_of_the_whole_static_cache(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded((40, 20))
    patch(model, compiled["sparse"].package)
    expected = logits(model, ids, mask)
    longer = torch.cat((mask, torch.ones(2, 24, dtype=torch.int64)), dim=1)
    cache = StaticCache(model.config, max_cache_len=64)
    found = model(ids, attention_mask=longer, past_key_values=cache).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_under_torch_compile(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    patch(model, compiled["sparse"].package)
    expected = logits(model, ids, mask)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(whole, ids, mask), expected, atol=TOLERANCE, rtol=0)


def test_two_models_of_one_config(compiled: dict[str, Compiled]) -> None:
    config = tiny_config()
    first, second = tiny_llama(config), tiny_llama(config)
    ids, mask = padded(LENGTHS)
    expected = logits(second, ids, mask)
    patch(first, compiled["sparse"].package)
    assert torch.equal(logits(second, ids, mask), expected)
    assert not torch.allclose(logits(first, ids, mask), expected, atol=0.1)
    assert config._attn_implementation == "sdpa"
    patch(second, compiled["dense"].package)
    assert not torch.allclose(logits(first, ids, mask), logits(second, ids, mask), atol=0.1)
    unpatch(first)
    torch.testing.assert_close(logits(second, ids, mask), expected, atol=TOLERANCE, rtol=0)


def attributes(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def test_unpatch_restores_everything(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    expected = logits(model, ids, mask)
    config, settings, before = model.config, model.config.to_dict(), attributes(model)
    patch(model, compiled["sparse"].package)
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
    patch(model, compiled["sparse"].package)
    generated(model, *padded((9, 4)), new_tokens=3)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, (parameter, _) in before.items())
    assert all(after[name].data_ptr() == address for name, (_, address) in before.items())
    assert fingerprint(model) == hashed


def test_a_copy_of_a_patched_model(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    ids, mask = padded(LENGTHS)
    dense = logits(model, ids, mask)
    patch(model, compiled["sparse"].package)
    other = copy.deepcopy(model)
    unpatch(model)
    assert not torch.allclose(logits(other, ids, mask), dense, atol=0.1)
    unpatch(other)
    assert torch.equal(logits(other, ids, mask), dense)


def test_a_patched_model_keeps_its_package_loaded(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Also where another load of the same package came and went."""
    ids, mask = padded(LENGTHS)
    folder = compile_package(sparse_topology(beyond="dense"), tmp_path / "kernels", dtypes=("fp32",))
    expected = logits(masked_model(model, sparse_topology(beyond="dense")), ids, mask)
    patch(model, load(folder))
    load(folder)
    gc.collect()
    torch.testing.assert_close(logits(model, ids, mask), expected, atol=TOLERANCE, rtol=0)


# What does not fit: said before anything is touched.


def with_shape(package: Package, **changes: Any) -> Package:
    """The package as if compiled for another model."""
    other = copy.copy(package)
    shape = dataclasses.replace(package.manifest.model, **changes)
    other.manifest = dataclasses.replace(package.manifest, model=shape)
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen2"},
            "model.config.model_type: expected 'qwen2', as the package was compiled for, got 'llama'",
        ),
        ({"num_hidden_layers": 30}, "model.config.num_hidden_layers: expected 30, .* got 3"),
        ({"num_attention_heads": 9}, "model.config.num_attention_heads: expected 9, .* got 4"),
        ({"num_key_value_heads": 1}, "model.config.num_key_value_heads: expected 1, .* got 2"),
        ({"head_dim": 64}, "model.config.head_dim: expected 64, .* got 32"),
        (
            {"weights_sha256": "0" * 64},
            "weights: expected those that the topology was learned on, SHA-256 0+, got [0-9a-f]{64}",
        ),
    ],
)
def test_another_model_is_refused(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], changes: dict[str, Any], message: str
) -> None:
    before = attributes(model)
    with pytest.raises(PatchError, match=message):
        patch(model, with_shape(compiled["dense"].package, **changes))
    assert attributes(model) == before


def test_the_weights_it_was_learned_on_are_taken(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    package = with_shape(compiled["dense"].package, weights_sha256=fingerprint(model))
    patch(model, package)
    unpatch(model)
    model.model.norm.weight[3] += 1e-3
    with pytest.raises(PatchError, match="weights: expected those that the topology was learned on"):
        patch(model, package)


def sliding(model: LlamaForCausalLM) -> None:
    model.config.sliding_window = 32


def layer_types(model: LlamaForCausalLM) -> None:
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]


def softcap(model: LlamaForCausalLM) -> None:
    model.config.attn_logit_softcapping = 30.0


def bidirectional(model: LlamaForCausalLM) -> None:
    model.config.is_causal = False


def attentions(model: LlamaForCausalLM) -> None:
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True


def bidirectional_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.is_causal = False


def sliding_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.sliding_window = 32


def sinks(model: LlamaForCausalLM) -> None:
    model.model.layers[2].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))


def other_heads(model: LlamaForCausalLM) -> None:
    model.model.layers[0].self_attn.v_head_dim = 16


def foreign_config(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.config = tiny_config()


def missing_layer(model: LlamaForCausalLM) -> None:
    del model.model.layers[2]


def double(model: LlamaForCausalLM) -> None:
    model.double()


def half(model: LlamaForCausalLM) -> None:
    model.half()


def meta(model: LlamaForCausalLM) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sliding, "LlamaForCausalLM: expected full attention in one of the layers .*, got sliding_attention; learn"),
        (layer_types, r"layers.1.self_attn.sliding_window: expected the window of .* 'sliding_attention', got none"),
        (softcap, "model.config.attn_logit_softcapping: expected scores that go into .* as they are, .*, got 30.0"),
        (bidirectional, "model.config: expected causal attention, got bidirectional"),
        (attentions, "model.config.output_attentions: expected False.*, got True"),
        (bidirectional_layer, r"model.layers.1.self_attn.is_causal: expected True, got False"),
        (sliding_layer, r"model.layers.1.self_attn.sliding_window: .* got 32"),
        (sinks, r"model.layers.2.self_attn.sinks: expected full causal attention"),
        (other_heads, r"model.layers.0.self_attn.v_head_dim: expected 32, .*, got 16"),
        (foreign_config, r"model.layers.1.self_attn.config: expected the model's own config, got another object"),
        (
            missing_layer,
            r"expected one attention module for each of the layers \[0, 1, 2\], .*, got those of the layers \[0, 1\]",
        ),
        (double, "expected weights in torch.float32, as the package's kernels, got torch.float64"),
        (half, "expected weights in torch.float32, as the package's kernels, got torch.float16"),
        (meta, "expected weights on the CPU or a GPU, got meta"),
    ],
)
def test_a_model_that_does_more_is_refused(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], change: Callable[[LlamaForCausalLM], None], message: str
) -> None:
    change(model)
    before = attributes(model)
    with pytest.raises(PatchError, match=message):
        patch(model, compiled["dense"].package)
    assert attributes(model) == before


def test_what_is_no_model_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    wrapper: Any = torch.nn.Sequential(model)
    with pytest.raises(PatchError, match="Sequential: expected a PreTrainedModel of Transformers"):
        patch(wrapper, compiled["dense"].package)


def test_an_attention_of_its_own_is_refused(compiled: dict[str, Compiled]) -> None:
    class Handmade(LlamaForCausalLM):
        _supports_attention_backend = False

    with pytest.raises(PatchError, match="Handmade: expected a model whose attention goes through"):
        patch(Handmade(tiny_config()), compiled["dense"].package)


def test_patching_twice_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(model, compiled["dense"].package)
    with pytest.raises(PatchError, match=r"LlamaForCausalLM: expected a model that is not patched.*unpatch\(model\)"):
        patch(model, compiled["sparse"].package)
    unpatch(model)
    patch(model.model, compiled["dense"].package)
    with pytest.raises(PatchError, match="model: expected a model that is not patched"):
        patch(model, compiled["sparse"].package)


def test_unpatching_an_unpatched_model_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    with pytest.raises(PatchError, match="LlamaForCausalLM: expected a patched model, got one that is not"):
        unpatch(model)
    patch(model, compiled["dense"].package)
    unpatch(model)
    with pytest.raises(PatchError, match="expected a patched model"):
        unpatch(model)


def test_choosing_the_attention_by_name_is_refused(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> None:
    patch(tiny_llama(), compiled["dense"].package)
    model.set_attn_implementation("surgeon")
    with pytest.raises(
        PatchError, match=r"LlamaAttention: expected .* bound to a kernel package.*surgeon.runtime.patch"
    ):
        model(tokens(1, 4))


# What a patched model will not do: said in the call, never computed as something else.


def test_a_model_on_a_gpu_that_the_package_has_no_kernels_for(
    model: LlamaForCausalLM, compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = torch.nn.Parameter(on_gpu(attention.q_proj.weight.data), requires_grad=False)
    message = r"layers.1.self_attn on cuda:0: expected kernels for cuda:90, this device's target, got only cpu; move"
    with pytest.raises(PatchError, match=message):
        patch(model, compiled["dense"].package)


@pytest.fixture
def patched(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    patch(model, compiled["dense"].package)
    return model


def mask_without(*holes: int, length: int = 20) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, list(holes)] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attention_mask": mask_without(7)},
            r"attention_mask\[1\]: .* got masked keys between valid ones; pad on the left",
        ),
        ({"attention_mask": mask_without(0, 7)}, "got masked keys between valid ones"),
        ({"attention_mask": mask_without(length=19)}, r"expected shape \[2, 20\].*got shape \[2, 19\]"),
        ({"attention_mask": mask_without()[:1]}, r"expected shape \[2, 20\].*got shape \[1, 20\]"),
        ({"attention_mask": mask_without(length=30)}, "attention_mask: expected at most 20 keys, as there are, got 30"),
        (
            {"attention_mask": mask_without(length=30), "use_cache": False},
            "attention_mask: expected 20 keys, as the layer has, got 30; pass the cache",
        ),
        ({"attention_mask": mask_without()[:, None]}, r"expected two dimensions \[batch, keys\], got 3 dimensions"),
        ({"attention_mask": torch.zeros(2, 1, 20, 20)}, r"got a mask of its own: torch.float32 \[2, 1, 20, 20\]"),
        ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)}, "got a mask of its own: torch.bool"),
        (
            {"position_ids": torch.arange(20).remainder(10).expand(2, -1), "use_cache": False},
            "mask: expected plain causal attention, got and_masks.*: sliding, packed",
        ),
        (
            {"output_attentions": True},
            "attention of layer 0: expected plain causal attention, got output_attentions=True",
        ),
        ({"sliding_window": 8}, "got sliding_window=8; call the model without sliding_window"),
        ({"softcap": 30.0}, "got softcap=30.0"),
        ({"s_aux": torch.zeros(4)}, "got s_aux=tensor"),
        ({"position_bias": torch.zeros(1, 4, 20, 20)}, "got position_bias=tensor"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, "got cu_seq_lens_q=tensor"),
    ],
)
def test_a_call_is_refused(patched: LlamaForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        patched(tokens(2, 20), **arguments)


def test_dropout_is_refused(compiled: dict[str, Compiled]) -> None:
    model = tiny_llama(tiny_config(attention_dropout=0.1))
    patch(model, compiled["dense"].package)
    model(tokens(1, 8))
    with pytest.raises(
        PatchError, match=r"attention of layer 0: expected no dropout, got dropout 0.1; call model.eval"
    ):
        model.train()(tokens(1, 8))


def test_decoding_after_right_padding_is_refused(patched: LlamaForCausalLM) -> None:
    mask = mask_without(18, 19)
    cache = patched(tokens(2, 20), attention_mask=mask).past_key_values
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), dim=1)
    with pytest.raises(PatchError, match="masked keys between valid ones"):
        patched(tokens(2, 1), attention_mask=longer, past_key_values=cache)


def test_a_mask_of_new_tokens_only_is_refused(patched: LlamaForCausalLM) -> None:
    cache = patched(tokens(2, 20)).past_key_values
    with pytest.raises(PatchError, match=r"expected shape \[2, 23\].*got shape \[2, 3\]"):
        patched(tokens(2, 3), attention_mask=torch.ones(2, 3), past_key_values=cache)


def test_a_layer_without_its_mask_is_refused(patched: LlamaForCausalLM) -> None:
    hidden = torch.zeros(1, 4, 64)
    rotary = patched.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(PatchError, match="got None; call the model, not one of its layers"):
        patched.model.layers[0](hidden, position_embeddings=rotary)


def test_a_layer_that_is_not_causal_is_refused(patched: LlamaForCausalLM) -> None:
    hidden = torch.zeros(1, 4, 64)
    arguments: dict[str, Any] = {
        "position_embeddings": patched.model.rotary_emb(hidden, torch.arange(4)[None]),
        "attention_mask": create_causal_mask(patched.config, hidden, attention_mask=None, past_key_values=None),
    }
    layer = patched.model.layers[0]
    layer(hidden, **arguments)
    with pytest.raises(PatchError, match="attention of layer 0: expected causal attention, got is_causal=False"):
        layer(hidden, is_causal=False, **arguments)


def test_a_bidirectional_call_is_refused(patched: LlamaForCausalLM) -> None:
    patched.config.is_causal = False
    with pytest.raises(PatchError, match="mask: expected plain causal attention, got bidirectional_mask_function"):
        patched(tokens(1, 8))


def test_an_overlaid_mask_is_refused(patched: LlamaForCausalLM) -> None:
    with pytest.raises(PatchError, match="mask: expected plain causal attention, got or_masks"):
        create_causal_mask(
            config=patched.config,
            inputs_embeds=torch.zeros(1, 4, 64),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda *_: True,
        )


def test_a_sliding_cache_is_refused(patched: LlamaForCausalLM) -> None:
    config = LlamaConfig(**(tiny_config().to_dict() | {"sliding_window": 8}))
    cache = DynamicCache(config=config)
    patched(tokens(1, 12), past_key_values=cache)
    with pytest.raises(PatchError, match="past_key_values: expected a cache that holds every token since the first"):
        patched(tokens(1, 1), past_key_values=cache)
