"""A pilot's figures equal a direct computation on the same sequences; its file is read back strictly."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kept_steps import KeptSteps
from models import Compiled, tiny_llama, tokens
from oracles import letters
from surgeon.runtime import SurgeonCache, fingerprint, patch
from surgeon.runtime.errors import ModelError, PilotError
from surgeon.runtime.evaluate.continuation import compare_continued
from surgeon.runtime.evaluate.estimates import Estimate, middle
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot, PilotMachine, PilotText, judged
from surgeon.runtime.evaluate.pilot.run import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.retrieval import AskedQuestion, DroppedTask
from surgeon.runtime.evaluate.steps import Once, anew
from surgeon.runtime.evaluate.tasks.prompts import Prompt, make_prompts

LENGTH = 96
HASH = "0" * 64


@pytest.fixture(autouse=True)
def _one(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def sequences() -> list[torch.Tensor]:
    return [tokens(1, LENGTH, seed) for seed in range(3)]


def piloted(
    package: Compiled, sequences: list[torch.Tensor], once: Once = anew, prompts: Sequence[Prompt] = ()
) -> tuple[Column, ...]:
    """The dense model, one that reads by the pattern, and one whose 16 last rows read everything."""
    dense = tiny_llama()
    candidates = [Candidate("dense", dense, None, 1.0)]
    for name, recall, rows in (("pattern", "pattern", 0), ("patched", "dense", 16)):
        model = twin(dense)
        patch(model, package.package, recall=recall, dense_rows=16)
        candidates.append(Candidate(name, model, package.package, 0.5, recall, rows))
    return run_pilot(candidates, sequences, letters(), prompts, rounds=2, once=once).columns


def test_its_figures_are_those_of_a_direct_comparison(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor]
) -> None:
    dense, pattern, patched = piloted(compiled["sparse"], sequences)
    model, other, recalling = tiny_llama(), tiny_llama(), tiny_llama()
    patch(other, compiled["sparse"].package, recall="pattern")
    patch(recalling, compiled["sparse"].package, recall="dense", dense_rows=16)
    forgotten, recalled = compare_continued([model, other, recalling], sequences, 16)
    assert dense.perplexity == forgotten.prompt.dense_perplexity
    assert dense.continuation_perplexity == forgotten.continuation.dense_perplexity
    assert dense.against_dense is None
    assert (dense.recall, pattern.recall, patched.recall, patched.dense_rows) == (None, "pattern", "dense", 16)
    for column, expected in ((pattern, forgotten), (patched, recalled)):
        beside = column.against_dense
        assert beside is not None
        assert column.perplexity == expected.prompt.patched_perplexity
        assert column.continuation_perplexity == expected.continuation.patched_perplexity
        for name in ("perplexity_ratio", "divergence", "late_divergence", "agreement"):
            assert getattr(beside, name) == getattr(expected.prompt, name)
        assert beside.continuation_ratio == expected.continuation.perplexity_ratio
        assert beside.continuation_divergence == expected.continuation.divergence
        assert beside.continuation_agreement == expected.continuation.agreement
        assert (beside.retrieval, beside.worst_retrieval, beside.worst_task) == (None, None, None)
        assert math.exp(sum(column.losses) / 3) == pytest.approx(column.perplexity.value, rel=1e-9)
    assert patched.continuation_perplexity != pattern.continuation_perplexity
    dense_bytes = 3 * 2 * 2 * LENGTH * 32 * 4  # layers, keys and values, KV heads, tokens, head size, fp32
    assert dense.kept_cache_bytes == patched.kept_cache_bytes == dense_bytes
    cache = SurgeonCache(compiled["sparse"].package)
    with torch.no_grad():
        other(sequences[0], past_key_values=cache)
    assert pattern.kept_cache_bytes == cache.kept_bytes()
    for column in (dense, pattern, patched):
        assert column.first_token.value > 0
        assert column.decode.value > 0
        assert column.weights_sha256 == fingerprint(model)
        assert column.peak_bytes is None or column.peak_bytes > sum(each.nbytes for each in model.parameters())


def test_what_was_measured_is_not_read_again_and_is_of_these_models(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptSteps()
    first = piloted(compiled["sparse"], sequences, kept)
    assert len(kept) == len(sequences)
    with monkeypatch.context() as patched:
        patched.setattr("surgeon.runtime.evaluate.continuation.continued_states", None)
        again = piloted(compiled["sparse"], sequences, kept)
    assert [(each.losses, each.continuation_perplexity) for each in again] == [
        (each.losses, each.continuation_perplexity) for each in first
    ]
    piloted(compiled["one cluster"], sequences, kept)
    assert len(kept) == 2 * len(sequences)


def test_answers_are_kept_for_each_model(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, int] = {}

    def answered(model: PreTrainedModel, _tokenizer: object, prompt: Prompt) -> tuple[float, ...]:
        return (1 - seen.setdefault(id(model), len(seen)) / 4,) * len(prompt.questions)

    kept = KeptSteps()
    prompts = make_prompts(letters(), [tokens(1, 1500)], (1500,), 1)
    monkeypatch.setattr("surgeon.runtime.evaluate.retrieval.scores", answered)
    first = piloted(compiled["sparse"], sequences, kept, prompts)
    assert [set(column.scores) for column in first] == [{1.0}, {0.75}, {0.5}]
    monkeypatch.setattr("surgeon.runtime.evaluate.retrieval.scores", lambda *_: pytest.fail("asked again"))
    again = piloted(compiled["sparse"], sequences, kept, prompts)
    assert [column.scores for column in again] == [column.scores for column in first]


def test_a_collapsed_topology_is_the_model_itself(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    for column in piloted(compiled["one cluster"], sequences)[1:]:
        beside = column.against_dense
        assert beside is not None
        assert beside.continuation_ratio is not None
        assert beside.perplexity_ratio.value == pytest.approx(1, abs=1e-5)
        assert beside.continuation_ratio.value == pytest.approx(1, abs=1e-5)
        assert beside.divergence.value == pytest.approx(0, abs=1e-6)
        assert beside.agreement.value == 1


def test_twins_share_weights_and_not_settings(compiled: dict[str, Compiled]) -> None:
    model = tiny_llama()
    other = twin(model)
    patch(other, compiled["sparse"].package, recall="pattern")
    assert [a.data_ptr() for a in model.parameters()] == [b.data_ptr() for b in other.parameters()]
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "surgeon")


def test_losses_that_are_no_numbers_are_refused(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    dense = tiny_llama()
    other = tiny_llama()
    torch.nn.init.constant_(other.lm_head.weight, math.inf)
    with pytest.raises(ModelError):
        run_pilot(
            [Candidate("dense", dense, None, 1.0), Candidate("patched", other, None, 0.5)],
            sequences,
            letters(),
            (),
            rounds=1,
        )


def test_a_median_has_an_error_that_one_disturbed_round_leaves_alone() -> None:
    quiet, disturbed = middle([1.0, 1.1, 0.9, 1.05, 0.95]), middle([1.0, 1.1, 0.9, 1.05, 50.0])
    assert quiet.value == 1.0
    assert disturbed.value == 1.05
    assert quiet.error == pytest.approx(math.sqrt(math.pi / 2) * 1.4826 * 0.05 / math.sqrt(5))
    assert disturbed.error == pytest.approx(quiet.error)
    assert middle([2.0]).error is None


@pytest.fixture(scope="module")
def pilot(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> Pilot:
    columns = piloted(compiled["sparse"], sequences[:2])
    asked = tuple(AskedQuestion("several keys", 96, depth, "later", 0) for depth in (0.1, 0.9))
    return Pilot(
        model="tiny",
        weights_sha256=fingerprint(tiny_llama()),
        package_id=HASH,
        length=LENGTH,
        texts=(PilotText("a.txt", HASH, 2),),
        machine=PilotMachine("a processor", "cpu", "fp32", 1, "2", "5", "2026-01-01"),
        questions=asked,
        dropped_tasks=(DroppedTask("common words", 2, 0.25),),
        columns=tuple(dataclasses.replace(column, scores=(1.0, index / 4)) for index, column in enumerate(columns)),
        thresholds=(),
        seconds=1.0,
    )


def test_the_file_holds_all_and_nothing_else_is_read(pilot: Pilot) -> None:
    assert Pilot.from_json(pilot.to_json()) == pilot
    whole = json.loads(pilot.to_json())

    def broken(change: dict[str, Any]) -> str:
        return json.dumps(whole | change)

    for text, where in (
        ("{", "pilot: line 1 column 2: expected JSON"),
        ("[]", "pilot: expected an object"),
        (broken({"version": 3}), "pilot: version: expected 1 or 2, got 3"),
        (
            broken({"version": 3, "surgeon": "9.1"}),
            "pilot: version: expected 1 or 2, got 3, as surgeon '9.1' writes it",
        ),
        (broken({"version": True}), "pilot: version: expected 1 or 2, got True"),
        (broken({"version": 1}), "pilot: columns.0.: passkeys: expected a list"),
        (broken({"version": 1, "columns": 5}), "pilot: columns: expected a list of objects"),
        (broken({"surgeon": 2}), "pilot: surgeon: expected a value of type str, got 2"),
        (broken({"questions": whole["questions"][:1]}), "pilot: columns.0.: scores: expected 1, one for each question"),
        (broken({"more": 1}), "pilot: expected the keys"),
        (broken({"length": "96"}), "pilot: length: expected a value of type int"),
        (broken({"seconds": math.nan}), "pilot: seconds: expected a finite number, got nan"),
        (broken({"columns": whole["columns"][1:]}), "pilot: columns: expected the dense model first"),
        (broken({"columns": []}), "pilot: columns: expected the dense model first"),
        (broken({"columns": whole["columns"][:1] * 2}), "pilot: columns: expected figures beside the dense model"),
    ):
        with pytest.raises(PilotError, match=where):
            Pilot.from_json(text)


def test_scores_are_averaged_over_the_questions_that_are_named(pilot: Pilot) -> None:
    column = pilot.column("patched")
    assert column is not None
    assert pilot.column("another") is None
    assert pilot.score(column) == Estimate(0.75, None), "of one prompt"
    assert pilot.score(column, "several keys", 96, "later", 0.9) == Estimate(0.5, None)
    for nothing in ({"task": "others"}, {"length": 64}, {"asked": "end"}, {"depth": 0.5}):
        assert pilot.score(column, **nothing) is None  # type: ignore[arg-type]


def test_a_file_of_version_1_is_read_as_one_by_the_pattern() -> None:
    half = {"value": 0.5, "error": None}
    cells = [
        {"length": 64, "depth": 0.1, "tried": 2, "found": 1, "log_probability": -1.5},
        {"length": 64, "depth": 0.9, "tried": 1, "found": 0, "log_probability": -2.5},
    ]
    names = ("perplexity_ratio", "divergence", "late_divergence", "agreement", "first_token_speedup", "decode_speedup")
    dense = {
        "name": "dense",
        "topology_sha256": None,
        "density": 1.0,
        "losses": [3.0],
        "perplexity": half,
        "against_dense": None,
        "passkeys": cells,
        "passkeys_found": half,
        "first_token": half,
        "decode": half,
        "peak_bytes": None,
        "kept_cache_bytes": None,
        "weights_sha256": HASH,
    }
    patched = dense | {"name": "patched", "against_dense": dict.fromkeys(names, half)}
    machine = dataclasses.asdict(PilotMachine("a processor", "cpu", "fp32", 1, "2", "5", "2026-01-01"))
    root = {
        "format": "surgeon.pilot",
        "version": 1,
        "model": "tiny",
        "weights_sha256": HASH,
        "package_id": HASH,
        "length": 64,
        "texts": [],
        "machine": machine,
        "columns": [dense, patched],
        "thresholds": [],
        "seconds": 1.0,
    }
    found = Pilot.from_json(json.dumps(root))
    assert [(each.task, each.length, each.depth, each.asked) for each in found.questions] == [
        ("single number", 64, depth, "end") for depth in (0.1, 0.1, 0.9)
    ]
    assert [column.scores for column in found.columns] == [(1, 0, 0)] * 2
    assert [(column.recall, column.dense_rows) for column in found.columns] == [(None, None), ("pattern", 0)]
    beside = found.columns[1].against_dense
    assert beside is not None
    assert (beside.continuation_ratio, beside.retrieval, beside.agreement) == (None, None, Estimate(0.5, None))
    assert Pilot.from_json(found.to_json()) == found, "written as version 2"
    del root["seconds"]
    with pytest.raises(PilotError, match="pilot: expected the keys"):
        Pilot.from_json(json.dumps(root))


def test_thresholds_and_changed_weights_decide(pilot: Pilot) -> None:
    beside = pilot.columns[1].against_dense
    assert beside is not None
    assert beside.continuation_ratio is not None
    quality, speed = beside.continuation_ratio.value, beside.first_token_speedup.value
    assert judged(beside, {"continuation_ratio": None}) == ()
    assert judged(beside, {"worst_retrieval": 0.9}) == (), "no task was asked"
    reached = {"continuation_ratio": quality, "first_token_speedup": speed}
    assert [each.met for each in judged(beside, reached)] == [True, True]
    missed = judged(beside, {"continuation_ratio": quality * 0.99, "first_token_speedup": speed * 1.01})
    assert [(each.found, each.met) for each in missed] == [(quality, False), (speed, False)]
    lost = dataclasses.replace(beside, worst_retrieval=Estimate(0.5, 0.1), worst_task="several keys")
    (threshold,) = judged(lost, {"worst_retrieval": 0.9})
    assert (threshold.figure, threshold.found, threshold.met) == (
        "retrieval, times dense, of the task several keys",
        0.5,
        False,
    )
    assert pilot.passed
    assert not dataclasses.replace(pilot, thresholds=missed[:1]).passed
    changed = dataclasses.replace(pilot.columns[1], weights_sha256=HASH)
    assert not dataclasses.replace(pilot, columns=(pilot.columns[0], changed)).passed
