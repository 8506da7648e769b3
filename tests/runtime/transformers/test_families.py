"""Every family's patched and traced model equals the model under the topology's mask."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, set_seed

import families
from models import masked_model, padded, sparse_topology, tiny_llama
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, SurgeonCache, load, patch, trace, unpatch
from surgeon.runtime.errors import PatchError
from surgeon.runtime.transformers import masks

pytestmark = pytest.mark.usefixtures("no_gradients")

LENGTHS = (70, 41, 5)  # in blocks of 16: beyond the topology's four, in the middle of a block, shorter than one
TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10

Compile = Callable[[Topology], Package]


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a topology once; families share the kernels, so that only the first takes time."""
    packages: dict[str, Package] = {}

    def compile_once(topology: Topology) -> Package:
        if topology.sha256 not in packages:
            folder = compile_package(topology, tmp_path_factory.mktemp("package") / "kernels", dtypes=("fp32",))
            packages[topology.sha256] = load(folder, strict=True)
        return packages[topology.sha256]

    return compile_once


def uncovered(topology: Topology, *layers: int) -> Topology:
    """The topology without these layers."""
    return dataclasses.replace(
        topology, layers=tuple(() if layer in layers else heads for layer, heads in enumerate(topology.layers))
    )


def check(model: PreTrainedModel, topology: Topology, package: Package, left: dict[int, str]) -> None:
    """Prefill, decoding with both kinds of caches, and unpatching, each against the explicit mask."""
    ids, mask = padded(LENGTHS)
    reference = masked_model(model, topology)
    dense, expected = (made(ids, attention_mask=mask).logits[mask.bool()] for made in (model, reference))
    assert (expected - dense).abs().max() > 1e3 * TOLERANCE  # the mask makes a difference
    continued = {
        cache: reference.generate(ids, attention_mask=mask, max_new_tokens=30, cache_implementation=cache)
        for cache in (None, "static")
    }
    assert {layer.layer: layer.reason for layer in patch(model, package, recall="pattern")} == left
    found = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    for cache, sequences in continued.items():
        again = model.generate(ids, attention_mask=mask, max_new_tokens=30, cache_implementation=cache)
        assert torch.equal(again, sequences)
    kept = SurgeonCache(package, model.config)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=30, past_key_values=kept)
    assert torch.equal(again, continued[None])
    assert 0 < kept.kept_bytes() < kept.full_bytes()
    unpatch(model)
    assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], dense)


@pytest.mark.parametrize("name", families.NAMES)
def test_patched(name: str, compiled_for: Compile) -> None:
    topology = families.of_family(sparse_topology(), name)
    check(families.tiny(name), topology, compiled_for(topology), families.LEFT.get(name, {}))


@pytest.mark.parametrize("name", sorted({*families.NAMES} - {"llama", "phi3", "qwen2 sliding"}))  # others' like
def test_traced(name: str, compiled_for: Compile) -> None:
    topology = families.of_family(sparse_topology(), name)
    model = families.tiny(name)
    graph = trace(model, compiled_for(topology), recall="pattern")
    reference = masked_model(model, topology)
    for lengths in (LENGTHS, (1,)):
        ids, mask = padded(lengths)
        expected = reference(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(graph(ids, mask)[mask.bool()], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
def test_a_topology_of_some_layers(layers: tuple[int, ...], compiled_for: Compile) -> None:
    topology = uncovered(sparse_topology(), *layers)
    check(tiny_llama(), topology, compiled_for(topology), dict.fromkeys(layers, "not covered by the topology"))
    model, (ids, mask) = tiny_llama(), padded(LENGTHS)
    expected = masked_model(model, topology)(ids, attention_mask=mask).logits[mask.bool()]
    graph = trace(model, compiled_for(topology), recall="pattern")
    torch.testing.assert_close(graph(ids, mask)[mask.bool()], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_layer_that_is_not_covered_is_what_it_was(implementation: str, static: bool, compiled_for: Compile) -> None:
    """Equality bit for bit, seen in the layers before the first covered one; in chunks, with and without padding."""
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    patched = copy.deepcopy(model)
    patch(patched, compiled_for(uncovered(sparse_topology(), 0, 1)), recall="pattern")
    for lengths in ((75, 20), (60,)):
        ids, mask = padded(lengths)
        caches = [
            StaticCache(model.config, max_cache_len=90) if static else DynamicCache(config=model.config)
            for _ in range(2)
        ]
        for begin, end in ((0, 17), (17, 59), (59, 60)):
            theirs, ours = (
                run(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    output_hidden_states=True,
                ).hidden_states[2]
                for run, cache in zip((model, patched), caches, strict=True)
            )
            assert torch.equal(ours, theirs)


def test_layers_that_are_not_covered_share_a_mask(compiled_for: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is made once per call, and nothing of it is kept."""
    make, made = masks._dense, []

    def counted(*given: Any) -> torch.Tensor | None:
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(masks, "_dense", counted)
    model, (ids, mask) = tiny_llama(), padded(LENGTHS)
    patch(model, compiled_for(uncovered(sparse_topology(), 0, 1)), recall="pattern")
    for calls in (1, 2):
        model(ids, attention_mask=mask)
        assert len(made) == calls
        assert not masks._MADE


@pytest.mark.parametrize("how", [{"prefill_chunk_size": 16}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generation_with_sliding_layers(how: dict[str, Any], compiled_for: Compile) -> None:
    topology = families.of_family(sparse_topology(), "gemma3")
    model, (ids, mask) = families.tiny("gemma3"), padded(LENGTHS)
    reference = masked_model(model, topology)
    patch(model, compiled_for(topology), recall="pattern")
    sequences = []
    for made in (reference, model):
        set_seed(7)
        sequences.append(made.generate(ids, attention_mask=mask, max_new_tokens=12, **({"do_sample": False} | how)))
    assert torch.equal(*sequences)


def test_a_sliding_layer_may_be_left_out(compiled_for: Compile) -> None:
    topology = families.of_family(uncovered(sparse_topology(), 0, 2), "gemma3")
    left = {0: "sliding_attention", 2: "not covered by the topology"}
    check(families.tiny("gemma3"), topology, compiled_for(topology), left)


def test_layers_that_keep_their_attention_are_logged(compiled_for: Compile, caplog: pytest.LogCaptureFixture) -> None:
    topology = families.of_family(sparse_topology(), "gemma2")
    with caplog.at_level("INFO", "surgeon"):
        patch(families.tiny("gemma2"), compiled_for(topology), recall="pattern")
    assert caplog.messages == ["layer 1 keeps its attention: sliding_attention"]


def test_an_attention_that_no_layer_can_keep_is_refused(compiled_for: Compile) -> None:
    model = families.tiny("qwen2 sliding")
    model.config._attn_implementation = "flex_attention"
    message = r"layers.2.self_attn, which keeps its attention: expected one of sdpa, eager, got 'flex_attention'; call"
    with pytest.raises(PatchError, match=message):
        patch(model, compiled_for(families.of_family(sparse_topology(), "qwen2")), recall="pattern")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping: expected .*, got 50.0; .*: no kernel caps",
        ),
        ("mistral", {"sliding_window": 24}, "got sliding_attention; .*load the model with sliding_window=None"),
        ("phi3", {"sliding_window": 24}, "got sliding_attention; .*load the model with sliding_window=None"),
        ("gemma3", {"use_bidirectional_attention": True}, "model.config: expected causal attention, got bidirectional"),
        ("qwen3", {"head_dim": 64}, "model.config.head_dim: expected 32, .* got 64"),
    ],
)
def test_refused(name: str, changes: dict[str, Any], message: str, compiled_for: Compile) -> None:
    model = families.tiny(name, **changes)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    with pytest.raises(PatchError, match=message):
        patch(model, compiled_for(families.of_family(sparse_topology(), name)), recall="pattern")
    assert {key: dict(vars(module)) for key, module in model.named_modules()} == before
