"""Costs and gains, against what they predict: dropping blocks and renormalising, and moving outputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import tiny_llama, tokens
from surgeon.compiler.learn.measure import attending
from surgeon.compiler.learn.measure.attention import block_sparse_attention
from surgeon.compiler.learn.measure.decoder import (
    Observation,
    dense_states,
    observe_dense,
    observe_sparse,
    sparse_divergence,
)
from surgeon.compiler.learn.measure.responses import block_responses, missed_shares, output_errors, responses
from surgeon.runtime.transformers.layers import find_attention

SIZE, BLOCKS, HEADS, LAYERS = 16, 5, 4, 3


def frozen() -> LlamaForCausalLM:
    model: LlamaForCausalLM = tiny_llama().double().requires_grad_(False)
    return model


def attention(model: LlamaForCausalLM, layer: int) -> Any:
    return find_attention(model)[layer][1]


def patterns(count: int, seed: int) -> torch.Tensor:
    """Random bool `[count, blocks, blocks]`, every block visible to itself."""
    drawn = torch.rand((count, BLOCKS, BLOCKS), generator=torch.Generator().manual_seed(seed)) < 0.4
    return drawn.tril() | torch.eye(BLOCKS, dtype=torch.bool)


def under(layer: Observation, pattern: torch.Tensor) -> torch.Tensor:
    """The layer's output if every head had this pattern."""
    visible = pattern.expand(HEADS, BLOCKS, BLOCKS)
    return block_sparse_attention(layer.q, layer.k, layer.v, visible, layer.scale)


@pytest.fixture(scope="module")
def dense_layers() -> list[Observation]:
    seen: list[Observation] = []
    observe_dense(frozen(), tokens(1, SIZE * BLOCKS), torch.Generator().manual_seed(0), seen.append)
    return seen


def test_every_layer_is_seen_last_first(dense_layers: list[Observation]) -> None:
    assert [layer.layer for layer in dense_layers] == [2, 1, 0]


def test_responses_are_those_of_dropping_blocks_and_renormalising(dense_layers: list[Observation]) -> None:
    candidates = patterns(3, seed=1)
    for layer in dense_layers:
        first, second = responses(layer, candidates)
        for index, pattern in enumerate(candidates):
            change = (layer.gradient * (under(layer, pattern) - layer.output)).sum(dim=2)
            torch.testing.assert_close(first[:, index], change.sum(dim=1), atol=1e-10, rtol=1e-9)
            torch.testing.assert_close(second[:, index], change.square().sum(dim=1), atol=1e-10, rtol=1e-9)


def test_candidates_may_differ_between_heads(dense_layers: list[Observation]) -> None:
    candidates = torch.stack([patterns(2, seed=head) for head in range(HEADS)])
    found = responses(dense_layers[0], candidates)[0]
    for head in range(HEADS):
        torch.testing.assert_close(found[head], responses(dense_layers[0], candidates[head])[0][head])


def test_a_block_responds_as_a_pattern_with_that_block_does(dense_layers: list[Observation]) -> None:
    dense, visible = dense_layers[0], patterns(HEADS, seed=3)
    output = block_sparse_attention(dense.q, dense.k, dense.v, visible, dense.scale)
    layer = dataclasses.replace(dense, output=output)
    found = block_responses(layer, visible)
    assert not found[visible].any()
    assert not found.triu(1).any()
    assert responses(layer, visible[:, None])[0].abs().max() < 1e-9
    for row, column in ((3, 1), (4, 0), (4, 2)):
        more = visible.clone()
        more[:, row, column] = True
        expected = responses(layer, more[:, None])[0][:, 0]
        torch.testing.assert_close(found[:, row, column], expected, atol=1e-9, rtol=1e-9)


def test_output_errors_are_those_behind_the_projection(dense_layers: list[Observation]) -> None:
    model, candidates = frozen(), patterns(3, seed=2)
    for layer in dense_layers:
        projection = attention(model, layer.layer).o_proj.weight
        found = output_errors(layer, candidates, projection)
        for index, pattern in enumerate(candidates):
            error = under(layer, pattern) - layer.output
            behind = error @ projection.unflatten(1, (HEADS, -1)).permute(1, 2, 0)
            # The factor of W_o is made in fp32.
            torch.testing.assert_close(found[:, index], behind.square().sum(dim=(1, 2)), atol=1e-6, rtol=1e-5)


def test_missed_shares_are_those_of_the_softmax(dense_layers: list[Observation]) -> None:
    layer, candidates = dense_layers[2], patterns(2, seed=5)
    keys = layer.k.repeat_interleave(HEADS // layer.k.shape[0], dim=0)
    causal = torch.ones(SIZE * BLOCKS, SIZE * BLOCKS, dtype=torch.bool).tril()
    scores = (layer.q @ keys.transpose(1, 2) * layer.scale).masked_fill(~causal, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    found = missed_shares(layer, candidates)
    for index, pattern in enumerate(candidates):
        hidden = ~pattern.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)
        torch.testing.assert_close(found[:, index], (weights * hidden).sum(dim=(1, 2)) / (SIZE * BLOCKS))


def test_what_a_window_costs_falls_to_nothing_as_it_grows(dense_layers: list[Observation]) -> None:
    full = torch.ones(1, BLOCKS, BLOCKS, dtype=torch.bool).tril()
    for costs in responses(dense_layers[1], full):
        assert costs.abs().max() < 1e-9


def shifted(model: LlamaForCausalLM, layer: int, shift: torch.Tensor) -> Callable[[], None]:
    """Adds `shift`, `[heads, length, head_dim]`, to a layer's attention output; returns what undoes it."""

    def move(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (output,) = arguments
        return (output + shift.transpose(0, 1).reshape(1, shift.shape[1], -1),)

    return attention(model, layer).o_proj.register_forward_pre_hook(move).remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_linear_changes_are_finite_differences_of_the_divergence(layer: int) -> None:
    model, ids, step = frozen(), tokens(1, SIZE * BLOCKS), 2e-3  # norms are in fp32
    dense = dense_states(model, ids)
    visible = [patterns(HEADS, seed=10 + index) for index in range(LAYERS)]
    seen: dict[int, Observation] = {}
    mean = observe_sparse(model, ids, dense, visible, lambda found: seen.update({found.layer: found}))
    assert mean == pytest.approx(sparse_divergence(model, ids, dense, visible), rel=1e-9)

    candidate = patterns(1, seed=20)
    predicted = responses(seen[layer], candidate)[0]
    move = under(seen[layer], candidate[0]) - seen[layer].output
    for head in range(HEADS):
        values = []
        for sign in (1, -1):
            shift = torch.zeros_like(move)
            shift[head] = sign * step * move[head]
            undo = shifted(model, layer, shift)
            values.append(sparse_divergence(model, ids, dense, visible) * ids.shape[1])
            undo()
        difference = (values[0] - values[1]) / (2 * step)
        assert float(predicted[head, 0]) == pytest.approx(difference, rel=1e-2, abs=1e-2)


def test_the_gradients_labels_are_the_models_own_and_repeat_with_the_seed() -> None:
    model, ids = frozen(), tokens(1, SIZE * BLOCKS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs: list[list[Observation]] = [[], [], []]
    for run, seed in zip(runs, (0, 0, 1), strict=True):
        observe_dense(model, ids, torch.Generator().manual_seed(seed), run.append)
    assert torch.equal(runs[0][0].gradient, runs[1][0].gradient)
    assert not torch.equal(runs[0][0].gradient, runs[2][0].gradient)
    assert model.config._attn_implementation != "surgeon_learning"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keeping_less_for_the_backward_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = frozen(), tokens(1, SIZE * BLOCKS)
    kept: list[Observation] = []
    remade: list[Observation] = []
    observe_dense(model, ids, torch.Generator().manual_seed(0), kept.append)
    monkeypatch.setattr(attending, "KEPT_BYTES", 0)
    observe_dense(model, ids, torch.Generator().manual_seed(0), remade.append)
    assert [layer.layer for layer in remade] == [2, 1, 0]
    for one, other in zip(kept, remade, strict=True):
        for name in ("q", "k", "v", "output", "gradient"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not any("forward" in vars(module) for module in model.modules())
