"""A traced model is one graph with one kernel per attention site, and the model is left unchanged."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from models import Compiled, masked_model, padded, tiny_config, tiny_llama, tokens
from surgeon.runtime import fingerprint, patch, trace, unpatch
from surgeon.runtime.errors import PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10; two orders of summation differ by 3e-5


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """One model for all tests, since tracing leaves it unchanged, which is tested."""
    return tiny_llama()


@pytest.fixture(scope="module")
def traced(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> dict[str, torch.fx.GraphModule]:
    return {name: trace(model, found.package, recall="pattern") for name, found in compiled.items()}


def sites(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=torch.ops.surgeon.attention_rotary.default))


@pytest.mark.parametrize("lengths", [(1,), (5, 3), (16,), (63, 64, 2), (65,), (150, 40)], ids=str)
@pytest.mark.parametrize("name", ["dense", "one cluster", "sparse"])
def test_logits_at_any_batch_and_length(
    model: LlamaForCausalLM,
    traced: dict[str, torch.fx.GraphModule],
    compiled: dict[str, Compiled],
    name: str,
    lengths: tuple[int, ...],
) -> None:
    reference = masked_model(model, compiled[name].topology) if name == "sparse" else model
    ids, mask = padded(lengths)
    expected = reference(ids, attention_mask=mask).logits[mask.bool()]
    graph = traced[name]
    for given in (mask, mask.bool()):
        torch.testing.assert_close(graph(ids, given)[mask.bool()], expected, atol=TOLERANCE, rtol=0)
    ids = tokens(len(lengths), max(lengths))
    torch.testing.assert_close(graph(ids), reference(ids).logits, atol=TOLERANCE, rtol=0)


def test_both_ways_in_agree(
    model: LlamaForCausalLM, traced: dict[str, torch.fx.GraphModule], compiled: dict[str, Compiled]
) -> None:
    ids, mask = padded((90, 33))
    patched = copy.deepcopy(model)
    patch(patched, compiled["sparse"].package, recall="pattern")
    expected = patched(ids, attention_mask=mask).logits
    torch.testing.assert_close(traced["sparse"](ids, attention_mask=mask), expected, atol=TOLERANCE, rtol=0)
    assert (expected - model(ids, attention_mask=mask).logits)[mask.bool()].abs().max() > 1e4 * TOLERANCE


def test_every_site_is_the_package_with_its_layer(
    traced: dict[str, torch.fx.GraphModule], compiled: dict[str, Compiled]
) -> None:
    for name, graph in traced.items():
        assert [node.args[-2:] for node in sites(graph)] == [(compiled[name].package.id, layer) for layer in range(3)]
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert not [target for target in targets if "scaled_dot_product" in target or "softmax" in target]
        assert [node.name for node in graph.graph.find_nodes(op="placeholder")] == ["input_ids", "attention_mask"]


def test_the_graph_keeps_the_package_loaded(traced: dict[str, torch.fx.GraphModule]) -> None:
    copied = copy.deepcopy(traced["sparse"])
    assert copied.meta["package"] is traced["sparse"].meta["package"]
    ids = tokens(1, 20)
    assert torch.equal(copied(ids), traced["sparse"](ids))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_shared_and_frozen(compiled: dict[str, Compiled], tied: bool) -> None:
    model = tiny_llama(tiny_config(tie_word_embeddings=tied))
    hashed = fingerprint(model)
    graph = trace(model, compiled["sparse"].package, recall="pattern")
    graph(tokens(1, 30))
    assert fingerprint(graph) == fingerprint(model) == hashed
    theirs = dict(graph.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert theirs.pop(name).data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad
    assert not theirs
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert set(graph.state_dict()) == set(model.state_dict())
    with torch.enable_grad():
        assert not graph(tokens(1, 30)).requires_grad


def attributes(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("way", ["unpatched", "patched", "patched with another", "training"])
def test_the_model_is_left_alone(compiled: dict[str, Compiled], way: str) -> None:
    model = tiny_llama(tiny_config(attention_dropout=0.5))
    if way == "training":
        model.train()
    elif way != "unpatched":
        patch(model, compiled["sparse" if way == "patched" else "dense"].package, recall="pattern")
    before, config = attributes(model), model.config
    graph = trace(model, compiled["sparse"].package, recall="pattern")
    assert attributes(model) == before
    assert model.config is config
    model.eval()
    ids = tokens(2, 70)
    if "patched" in way.split():
        unpatch(model)
    expected = masked_model(model, compiled["sparse"].topology)(ids).logits
    torch.testing.assert_close(graph(ids), expected, atol=TOLERANCE, rtol=0)


class OtherAttention(LlamaAttention):
    """An attention module that bypasses the attention interface."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), None


class NoAttention(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return hidden_states, None


class Untraceable(LlamaAttention):
    """An attention module that reads tensor values in Python."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return hidden_states * 2 if hidden_states.sum() > 0 else hidden_states, None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            OtherAttention,
            "traced graph: scaled_dot_product_attention: expected no attention but the package's, got aten.scaled_dot",
        ),
        (NoAttention, r"traced graph: expected one attention for each of the layers \[0, 1, 2\], got .* \[0, 2\]"),
        (Untraceable, "torch.export: expected a model that can be traced.*; use patch"),
    ],
)
def test_all_sites_or_none(compiled: dict[str, Compiled], kind: type[LlamaAttention], message: str) -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.__class__ = kind
    before = attributes(model)
    with pytest.raises(PatchError, match=message):
        trace(model, compiled["dense"].package, recall="pattern")
    assert attributes(model) == before


def test_another_model_is_refused(compiled: dict[str, Compiled]) -> None:
    model = tiny_llama(tiny_config(num_hidden_layers=2))
    with pytest.raises(PatchError, match=r"model\.config\.num_hidden_layers: expected 3, .* got 2"):
        trace(model, compiled["dense"].package, recall="pattern")


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (tokens(2, 9), torch.ones(2, 8), r"attention_mask: expected shape \[2, 9\], as input_ids, got \[2, 8\]"),
        (tokens(2, 9)[0], None, r"input_ids: expected two dimensions \[batch, length\], got 1"),
        (tokens(1, 3), torch.tensor([[1, 0, 1]]), r"attention_mask\[0\]: .*got masked keys between valid ones"),
    ],
)
def test_a_call_is_refused(
    traced: dict[str, torch.fx.GraphModule], ids: torch.Tensor, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        traced["dense"](ids, mask)
