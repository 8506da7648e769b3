"""Trees by gradient descent: dense at the first step, ultrametric, finite gradients, the requested density."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from models import tiny_llama, tokens
from surgeon.compiler.learn.learn import Effort, Request, learn
from surgeon.compiler.learn.measure.attending import attending, last_states
from surgeon.compiler.learn.measure.attention import masked_attention
from surgeon.compiler.learn.measure.decoder import dense_states, pull_masks
from surgeon.compiler.learn.patterns.windows import window_patterns
from surgeon.compiler.learn.texts.text import TokenText
from surgeon.compiler.learn.ultrametric import descent
from surgeon.compiler.learn.ultrametric.descent import Settings, masks_at
from surgeon.compiler.learn.ultrametric.digits import (
    collapsed_logits,
    depth_for,
    expected_distances,
    hard_digits,
    sample,
)
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.write import spelled

LAYERS, HEADS, BLOCKS, SIZE = 3, 4, 8, 16
ALWAYS = window_patterns(BLOCKS, 1)[1]
REQUEST = Request(0.6, BLOCKS * SIZE, SIZE, method="ultrametric", settings=Settings(steps=12))
EFFORT = Effort(calibrate=2, validate=1, refine=())

pytestmark = pytest.mark.usefixtures("one_thread")


def texts() -> list[TokenText]:
    return [TokenText("a", "a" * 64, tokens(1, 6 * BLOCKS * SIZE)[0])]


def random_logits(arity: int) -> torch.Tensor:
    shape = (HEADS, BLOCKS, depth_for(BLOCKS, arity), arity)
    return torch.randn(shape, generator=torch.Generator().manual_seed(arity))


@pytest.mark.parametrize("arity", [2, 3, 5, 7])
def test_distances_of_hard_digits_are_those_of_the_paths_and_ultrametric(arity: int) -> None:
    digits = hard_digits(random_logits(arity))
    found = expected_distances(digits).numpy()
    for head in range(HEADS):
        paths = digits[head].argmax(dim=-1).tolist()
        d = found[head]
        np.testing.assert_array_equal(d, Dendrogram.from_paths(paths, arity, "paths").distances())
        assert (d[:, None, :] <= np.maximum(d[:, :, None], d[None, :, :])).all()


def test_expected_distances_lie_between_equal_and_apart_and_become_hard_with_the_digits() -> None:
    soft = torch.softmax(random_logits(3), dim=-1)
    found = expected_distances(soft)
    assert float(found.min()) > 0
    assert float(found.max()) < depth_for(BLOCKS, 3)
    torch.testing.assert_close(found, found.transpose(1, 2))
    sharp = expected_distances(torch.softmax(1e4 * random_logits(3), dim=-1))
    torch.testing.assert_close(sharp, expected_distances(hard_digits(random_logits(3))), atol=1e-3, rtol=0)


def test_the_mask_is_hard_and_holds_sink_and_window() -> None:
    found = sample(random_logits(2), torch.ones(HEADS), ALWAYS, 0.5, 1.0, torch.Generator().manual_seed(0))
    rounded = found.masks.round()
    torch.testing.assert_close(found.masks, rounded, atol=1e-6, rtol=0)
    assert (rounded[:, ALWAYS] == 1).all()
    assert not rounded.triu(1).any()
    assert 0 < float(rounded.mean()) < 0.6
    assert float(found.balance) > 0


def test_the_first_step_is_the_dense_model() -> None:
    model, ids = tiny_llama().requires_grad_(False), tokens(1, BLOCKS * SIZE)
    state = {
        "logits": torch.stack([collapsed_logits(HEADS, BLOCKS, 2)] * LAYERS),
        "cuts": torch.zeros(LAYERS, HEADS),
    }
    masks = [found.masks for found in masks_at(state, Settings(), 0, 0, ALWAYS)]
    causal = torch.ones(BLOCKS, BLOCKS).tril().expand(HEADS, BLOCKS, BLOCKS)
    assert all(torch.equal(mask.round(), causal) for mask in masks)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return masked_attention(q[0], k[0], v[0], masks[layer], scale)[None]

    with torch.no_grad():
        expected = model(ids).logits[0]
        with attending(model, attend):
            found = model.lm_head(last_states(model, ids))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    later = [found.masks for found in masks_at(state, Settings(), 59, 0, ALWAYS)]
    assert not all(torch.equal(mask.round(), causal) for mask in later), "noise rises"


def test_gradients_are_finite_in_fp16_autocast() -> None:
    model, ids = tiny_llama().requires_grad_(False), tokens(1, BLOCKS * SIZE)
    logits = torch.stack([collapsed_logits(HEADS, BLOCKS, 3)] * LAYERS).requires_grad_()
    cuts = torch.zeros(LAYERS, HEADS, requires_grad=True)
    dense = dense_states(model, ids)
    for step in (1, 40, 59):
        with torch.autocast("cpu", torch.float16):
            samples = masks_at({"logits": logits, "cuts": cuts}, Settings(arity=3), step, 0, ALWAYS)
            penalty = torch.stack([found.balance for found in samples]).mean()
            masks = torch.stack([found.masks for found in samples])
            divergence, pull = pull_masks(model, ids, dense, masks)
        torch.autograd.backward([masks, penalty], [pull, torch.ones_like(penalty)])
        assert np.isfinite(divergence)
        for parameter in (logits, cuts):
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


def test_training_reaches_the_density_and_repeats_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = learn(tiny_llama(), texts(), REQUEST, EFFORT)
    assert found.provenance["density"] <= 0.6
    assert found.provenance["steps_descended"] == 12
    assert parse_topology(spelled(found)).sha256 == found.sha256

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path, progress=stop)
    steps = []
    descend = descent._descend
    monkeypatch.setattr(descent, "_descend", lambda *arguments: steps.append(arguments[-1]) or descend(*arguments))
    again = learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)
    assert again.sha256 == found.sha256
    assert steps == [10], "the first ten steps were kept"


def test_other_arities_and_seeds_give_other_trees() -> None:
    other = dataclasses.replace(REQUEST, settings=Settings(steps=12, arity=3))
    seeded = dataclasses.replace(REQUEST, seed=1)
    assert len({learn(tiny_llama(), texts(), request, EFFORT).sha256 for request in (REQUEST, other, seeded)}) == 3
