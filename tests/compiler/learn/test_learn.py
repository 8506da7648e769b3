"""Learning on a tiny random model, from texts to a topology: repeatable, resumable, and better than equal windows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import tiny_llama, tokens
from surgeon.compiler.learn.learn import Effort, Request, learn
from surgeon.compiler.learn.measure import runs
from surgeon.compiler.learn.measure.checkpoint import check_decoder
from surgeon.compiler.learn.texts.text import TokenText
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import Topology, WindowHead
from surgeon.compiler.topology.write import spelled
from surgeon.runtime import fingerprint, weights_id
from surgeon.runtime.errors import ModelError, TopologyError

LENGTH, SIZE = 128, 16
REQUEST = Request(density=0.5, length=LENGTH, block_size=SIZE)
EFFORT = Effort(calibrate=2, validate=2, refine=(1, 1))

pytestmark = pytest.mark.usefixtures("one_thread")


def texts() -> list[TokenText]:
    return [TokenText(name, name * 64, tokens(1, 8 * LENGTH, seed)[0]) for seed, name in enumerate("ab")]


def windows(topology: Topology) -> list[int]:
    return [head.window for layer in topology.layers for head in layer if isinstance(head, WindowHead)]


def test_it_beats_equal_windows_and_says_what_it_did(tmp_path: Path) -> None:
    model = tiny_llama()
    before = fingerprint(model)
    topology = learn(model, texts(), REQUEST, EFFORT)
    assert fingerprint(model) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    said = topology.provenance
    assert 0.45 < said["density"] <= 0.5
    assert said["validation"]["divergence"] < said["validation"]["equal_windows"]
    assert said["weights_sha256"] == before
    assert topology.model.weights_sha256 == weights_id(model)
    assert said["texts"] == [{"name": name, "sha256": name * 64, "tokens": 8 * LENGTH} for name in "ab"]
    assert said["sequences"] == {"calibrate": 4, "validate": 4, "refine": [2, 2], "with_questions": 0}
    assert said["rounds"]
    kept = [step["divergence"] for step in said["rounds"] if step["kept"]]
    assert kept == sorted(kept, reverse=True)
    if kept:
        assert said["validation"]["divergence"] == kept[-1]
    assert len(set(windows(topology))) > 2


def test_equal_seeds_give_equal_topologies() -> None:
    first, again = (learn(tiny_llama(), texts(), REQUEST, EFFORT) for _ in range(2))
    assert first.sha256 == again.sha256
    other = learn(tiny_llama(), texts(), Request(0.5, LENGTH, SIZE, seed=1), EFFORT)
    assert other.sha256 != first.sha256


def test_for_answers_by_default_and_for_text_on_request() -> None:
    """For answers, the last layer keeps least, since nothing reads what its rows of the prompt compute."""
    answers, text = (
        learn(tiny_llama(), texts(), dataclasses.replace(REQUEST, purpose=purpose), EFFORT)
        for purpose in (None, "text")
    )
    assert (answers.provenance["for"], text.provenance["for"]) == ("answers", "text")
    kept = [sum(getattr(head, "window", 0) for head in layer) for layer in answers.layers]
    assert kept[2] == 4 < kept[0]
    assert answers.provenance["validation"]["divergence"] < text.provenance["validation"]["divergence"]


@pytest.mark.parametrize("method", ["ultrametric", "window"])
def test_other_methods_do_not_learn_for_answers(method: str) -> None:
    request = dataclasses.replace(REQUEST, method=method, purpose="answers")
    with pytest.raises(TopologyError, match=f"--for answers: expected --method budget, got --method {method}"):
        learn(tiny_llama(), texts(), request, EFFORT)


class Interrupting:
    """A progress that stops the run, as Ctrl-C does, when it is called for the nth time."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 <= done < total
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_continues_to_the_same_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learn(tiny_llama(), texts(), REQUEST, EFFORT)
    kept = 0
    for calls in (2, 7, 16):
        with pytest.raises(KeyboardInterrupt):
            learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path, progress=Interrupting(calls))
        assert len(list(tmp_path.iterdir())) > kept
        kept = len(list(tmp_path.iterdir()))
    found = learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)
    assert found.sha256 == expected.sha256
    assert found.provenance["validation"] == expected.provenance["validation"]

    monkeypatch.setattr(runs, "observe_dense", None)  # everything has been done: no pass is repeated
    monkeypatch.setattr(runs, "sparse_divergence", None)
    again = learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)
    assert again.sha256 == expected.sha256
    steps = (found.provenance["steps"], again.provenance["steps"])
    assert steps[1] == {"computed": 0, "found": sum(steps[0].values())}


def test_steps_of_another_model_or_text_are_not_taken(tmp_path: Path) -> None:
    learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)
    found = learn(tiny_llama(seed=1), texts(), REQUEST, EFFORT, work=tmp_path)
    assert found.sha256 == learn(tiny_llama(seed=1), texts(), REQUEST, EFFORT).sha256


def test_a_damaged_step_is_an_error_that_says_what_to_delete(tmp_path: Path) -> None:
    learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"expected the result of an earlier step, got .*; delete"):
        learn(tiny_llama(), texts(), REQUEST, EFFORT, work=tmp_path)


def test_cuts_are_tried_on_text_of_their_own_and_kept_only_if_they_help() -> None:
    plain = learn(tiny_llama(), texts(), REQUEST, EFFORT)
    found = learn(tiny_llama(), texts(), dataclasses.replace(REQUEST, cuts=True), EFFORT)
    said = found.provenance
    assert said["cut_rounds"]
    kept = [step for step in said["cut_rounds"] if step["kept"]]
    assert said["heads_with_a_cut"] == (kept[0]["cuts"] if kept else 0)
    assert said["density"] <= 0.5
    if kept:
        assert said["validation"]["divergence"] < plain.provenance["validation"]["divergence"]
        assert parse_topology(spelled(found)).sha256 == found.sha256
    else:
        assert found.sha256 == plain.sha256


def test_cuts_need_text_of_their_own() -> None:
    short = [TokenText("short", "0" * 64, tokens(1, 3 * LENGTH)[0])]
    with pytest.raises(ModelError, match="--cuts: expected 6 sequences of 128 tokens in a text"):
        learn(tiny_llama(), short, dataclasses.replace(REQUEST, cuts=True), EFFORT)


def test_equal_windows_need_no_text() -> None:
    topology = learn(tiny_llama(), [], Request(0.5, LENGTH, SIZE, method="window"))
    assert max(windows(topology)) - min(windows(topology)) <= 1
    assert topology.provenance["density"] == pytest.approx(0.5, abs=0.02)


def test_windows_are_scaled_to_another_length() -> None:
    short = learn(tiny_llama(), texts(), REQUEST, EFFORT)
    long = learn(tiny_llama(), texts(), Request(0.5, 2 * LENGTH, SIZE, measured_length=LENGTH), EFFORT)
    assert long.num_blocks == 2 * short.num_blocks
    assert windows(long) == [2 * window for window in windows(short)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0.5, 100, SIZE), "--length: expected a multiple of the block, 16 tokens, got 100"),
        (Request(0.1, LENGTH, SIZE), "--density: expected at least 0.4167: .*, got 0.1"),
        (Request(0.5, 1024, SIZE), "a: expected at least 2048 tokens"),
        (
            Request(0.5, 256, SIZE, measured_length=LENGTH, cuts=True),
            "clusters: expected equal --length and --measured",
        ),
    ],
)
def test_what_cannot_be_had_is_an_error(request_: Request, message: str) -> None:
    with pytest.raises((ModelError, TopologyError), match=message):
        learn(tiny_llama(), texts(), request_, EFFORT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50},
            "attention of layer 0: expected causal attention with an output projection o_proj",
        ),
        (
            {
                "model_type": "mistral",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 50,
                "sliding_window": 16,
            },
            "config.sliding_window: expected full causal attention, so None, got 16",
        ),
    ],
)
def test_a_model_that_is_no_decoder_with_full_attention_is_refused(config: dict[str, Any], message: str) -> None:
    kind = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    with pytest.raises(ModelError, match=message):
        learn(model, texts(), REQUEST, EFFORT)


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear: expected a model whose attention goes through AttentionInterface"):
        check_decoder(torch.nn.Linear(2, 2))
