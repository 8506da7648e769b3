"""From texts to a topology with routed heads: repeatable, within the density, and refused where it cannot be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import topologies
from models import tiny_config, tiny_llama
from oracles import letters
from surgeon.compiler.learn.learn import Effort, Request, learn
from surgeon.compiler.learn.measure.checkpoint import model_shape
from surgeon.compiler.learn.texts.text import TokenText
from surgeon.compiler.system.stages import StageDisplay
from surgeon.compiler.topology.topology import Topology, WindowHead, mean_density
from surgeon.runtime.errors import ModelError, TopologyError

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, SIZE = 1280, 16
EFFORT = Effort(calibrate=2, validate=1, refine=())


def model() -> LlamaForCausalLM:
    return tiny_llama(tiny_config(vocab_size=len(letters()), max_position_embeddings=2048))


def texts(length: int = LENGTH) -> list[TokenText]:
    generator = torch.Generator().manual_seed(0)
    return [TokenText(name, name * 64, torch.randint(1, 90, (4 * length,), generator=generator)) for name in ("a", "b")]


def windows(
    head_dim: int = 32, block_size: int = SIZE, num_blocks: int = LENGTH // SIZE, purpose: str | None = None
) -> Topology:
    heads = [topologies.window_head(1, window) for window in (30, 8, 12, 20)]
    made = topologies.build(
        [heads] * 3, num_kv_heads=2, head_dim=head_dim, block_size=block_size, num_blocks=num_blocks
    )
    shape = dataclasses.replace(made.model, model_type=model_shape(model()).model_type)
    return dataclasses.replace(made, model=shape, provenance={} if purpose is None else {"for": purpose})


def routed_windows() -> Topology:
    heads = [topologies.window_head(1, 8, route=4)] * 4
    return topologies.build([heads] * 3, num_kv_heads=2, head_dim=32, block_size=SIZE, num_blocks=LENGTH // SIZE)


REQUEST = Request(0.4, LENGTH, SIZE, route="learned")


def test_heads_that_retrieve_choose_enough_and_the_others_what_their_windows_had(tmp_path: Path) -> None:
    request = dataclasses.replace(REQUEST, windows=windows())
    found = learn(model(), texts(), request, EFFORT, tmp_path, tokenizer=letters())
    heads = [head for layer in found.layers for head in layer]
    assert all(isinstance(head, WindowHead) for head in heads)
    enough = [head for head in heads if isinstance(head, WindowHead) and head.route >= 352 // SIZE]
    assert len(enough) >= len(heads) // 4
    said = found.provenance
    tokens = int(said["routes"]["way"].removesuffix(" near"))
    assert tokens in (64, 128)
    for head in heads:
        assert isinstance(head, WindowHead)
        assert head.window == tokens // SIZE if head.route else head.window <= tokens // SIZE
    assert 0.37 < mean_density(found) <= 0.4
    assert found.router is not None
    for layer, router in zip(found.layers, found.router.layers, strict=True):
        assert (router is not None) == any(isinstance(head, WindowHead) and head.route for head in layer)
    assert said["windows_of"] == windows().sha256
    assert said["for"] == "text"
    assert said["routes"]["heads"] == sum(isinstance(head, WindowHead) and head.route > 0 for head in heads)
    assert said["routes"]["documents"] == 4
    assert 0 <= said["routes"]["agreement_of_halves"] <= 1

    again = learn(model(), texts(), request, EFFORT, tmp_path, tokenizer=letters())
    assert again.sha256 == found.sha256
    assert again.provenance["steps"] == {"computed": 0, "found": 4 + 2 + 3 * 2}  # documents, dense states, three ways


def test_conversion_needs_no_documents_and_keeps_the_density_and_what_follows_best() -> None:
    request = dataclasses.replace(REQUEST, route="convert", windows=windows())
    said: list[str] = []
    display = StageDisplay(said.append)
    found = learn(model(), texts(), request, EFFORT, progress=display)
    assert said[0].startswith("2 stages, ")
    assert "stage 1 of 2, measuring the ranges of keys" in said[1]
    assert any("stage 2 of 2, validating routes" in line for line in said)
    routes = found.provenance["routes"]
    divergences = routes["validation"]
    assert set(divergences) == {"windows", "64 near", "128 near"}
    assert routes["way"] == min(divergences, key=lambda way: divergences[way])
    near = {"windows": 80, "64 near": 4, "128 near": 8}[routes["way"]]
    expected = {(min(window, near), max(0, window - near)) for window in (30, 8, 12, 20)}
    assert {(head.window, head.route) for layer in found.layers for head in layer if isinstance(head, WindowHead)} == (
        expected
    )
    assert mean_density(found) == mean_density(windows())
    assert routes["heads"] == 3 * sum(route > 0 for _, route in expected)
    assert found.provenance["steps"] == {"computed": 2 + 3 * 2, "found": 0}


def test_near_tokens_that_are_given_are_the_only_ones_tried() -> None:
    request = dataclasses.replace(REQUEST, route="convert", windows=windows(), near=32)
    routes = learn(model(), texts(), request, EFFORT).provenance["routes"]
    assert set(routes["validation"]) == {"windows", "32 near"}


@pytest.mark.parametrize("purpose", ["answers", "text"])
def test_windows_without_a_route_are_scaled_and_stay_for_what_they_were_learned_for(purpose: str) -> None:
    given = windows(num_blocks=40, purpose=purpose)
    found = learn(model(), texts(), Request(0.4, LENGTH, SIZE, windows=given), EFFORT)
    assert {head for layer in found.layers for head in layer} == {WindowHead(1, 2 * each) for each in (30, 8, 12, 20)}
    assert found.num_blocks == LENGTH // SIZE
    assert found.router is None
    assert found.provenance["for"] == purpose
    assert found.provenance["windows_of"] == given.sha256
    assert "texts" not in found.provenance  # the windows do not say what they were learned on, and nothing was measured
    assert found.provenance["steps"] == {"computed": 0, "found": 0}
    texts_of = {"texts": [{"name": "c"}], "measured_length": 640}
    said = dataclasses.replace(given, provenance={**given.provenance, **texts_of})
    assert (
        learn(model(), texts(), Request(0.4, LENGTH, SIZE, windows=said), EFFORT).provenance.items() >= texts_of.items()
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"purpose": "answers"}, r"--route learned: expected --method budget and --for text, without --cuts"),
        ({"route": "lerned"}, r"--route: expected convert or learned, got 'lerned'; leave it out for none"),
        ({"cuts": True, "windows": None}, r"--route learned: expected --method budget and --for text, without --cuts"),
        ({"method": "ultrametric", "windows": None}, r"--route learned: expected --method budget and --for text, "),
        ({"windows": windows(block_size=32, num_blocks=40)}, r"--windows: expected --block 32, as the topology has it"),
        ({"near": 8}, r"--near: expected --route, and at least a block of 16 tokens, got 8; leave it out"),
        ({"near": 64, "route": None}, r"--near: expected --route, and at least a block of 16 tokens, got 64"),
        (
            {"windows": routed_windows()},
            r"--windows: expected with --route, a topology of windows alone, got one that has",
        ),
        ({"questions": True}, r"--windows: expected --method budget, without --cuts and --questions"),
        (
            {"route": None, "windows": windows(purpose="text"), "purpose": "answers"},
            r"--windows: expected --for text, as",
        ),
        ({"windows": windows(head_dim=64)}, r"--windows: expected a topology for ModelShape"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], text: str) -> None:
    request = dataclasses.replace(REQUEST, windows=windows())
    with pytest.raises(TopologyError, match=text):
        learn(model(), texts(), dataclasses.replace(request, **change), EFFORT, tokenizer=letters())


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: learn(model(), texts(), REQUEST, EFFORT), "learn: expected the model's tokenizer"),
        (
            lambda: learn(
                model(),
                texts(320),
                Request(0.4, 320, SIZE, route="learned", windows=windows(num_blocks=20)),
                EFFORT,
                tokenizer=letters(),
            ),
            "--retrieve: expected sequences that have room for hidden facts and questions, got sequences of 320 tokens",
        ),
    ],
    ids=["no tokenizer", "short sequences"],
)
def test_what_facts_cannot_be_hidden_in_is_refused(run: Callable[[], Topology], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        run()
