"""A pilot's figures equal a direct computation on the same sequences; its file is read back strictly."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from models import VOCABULARY, Compiled, tiny_llama, tokens
from surgeon.runtime import SurgeonCache, fingerprint, patch
from surgeon.runtime.errors import ModelError, PilotError
from surgeon.runtime.evaluate.comparison import compare
from surgeon.runtime.evaluate.estimates import middle, ratio
from surgeon.runtime.evaluate.passkeys import DEPTHS, Passkey, passkeys, retrieve
from surgeon.runtime.evaluate.pilot import Candidate, run_pilot, twin
from surgeon.runtime.evaluate.pilot_file import Column, Pilot, PilotMachine, PilotText, judged

LENGTH = 96
HASH = "0" * 64


@pytest.fixture(autouse=True)
def _one(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def sequences() -> list[torch.Tensor]:
    return [tokens(1, LENGTH, seed) for seed in range(3)]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts a special token before every text."""
    characters = sorted({*map(chr, range(32, 127)), "\n"})
    known = {"<s>": 0} | {character: index + 1 for index, character in enumerate(characters)}
    single = Tokenizer(WordLevel({**known, "?unknown": 0}, unk_token="?unknown"))
    single.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=single, unk_token="?unknown", bos_token="<s>")


def piloted(package: Compiled, sequences: list[torch.Tensor], tasks: tuple[Passkey, ...] = ()) -> tuple[Column, ...]:
    dense = tiny_llama()
    patched = twin(dense)
    patch(patched, package.package, recall="pattern")
    candidates = [Candidate("dense", dense, None, 1.0), Candidate("patched", patched, package.package, 0.5)]
    return run_pilot(candidates, sequences, tasks, rounds=2)


def test_its_figures_are_those_of_a_direct_comparison(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor]
) -> None:
    dense, patched = piloted(compiled["sparse"], sequences)
    model, other = tiny_llama(), tiny_llama()
    patch(other, compiled["sparse"].package, recall="pattern")
    expected = compare(model, other, sequences)
    assert dense.perplexity == expected.dense_perplexity
    assert patched.perplexity == expected.patched_perplexity
    beside = patched.against_dense
    assert dense.against_dense is None
    assert beside is not None
    for name in ("perplexity_ratio", "divergence", "late_divergence", "agreement"):
        assert getattr(beside, name) == getattr(expected, name)
    assert beside.divergence.value > 0.01
    assert math.exp(sum(patched.losses) / 3) == pytest.approx(patched.perplexity.value, rel=1e-9)
    dense_bytes = 3 * 2 * 2 * LENGTH * 32 * 4  # layers, keys and values, KV heads, tokens, head size, fp32
    assert dense.kept_cache_bytes == dense_bytes
    cache = SurgeonCache(compiled["sparse"].package)
    with torch.no_grad():
        other(sequences[0], past_key_values=cache)
    assert patched.kept_cache_bytes == cache.kept_bytes()
    for column in (dense, patched):
        assert column.first_token.value > 0
        assert column.decode.value > 0
        assert column.weights_sha256 == fingerprint(model)
        assert column.peak_bytes is None or column.peak_bytes > sum(each.nbytes for each in model.parameters())


def test_a_collapsed_topology_is_the_model_itself(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    _, patched = piloted(compiled["one cluster"], sequences)
    beside = patched.against_dense
    assert beside is not None
    assert beside.perplexity_ratio.value == pytest.approx(1, abs=1e-5)
    assert beside.divergence.value == pytest.approx(0, abs=1e-6)
    assert beside.agreement.value == 1


def test_twins_share_weights_and_not_settings(compiled: dict[str, Compiled]) -> None:
    model = tiny_llama()
    other = twin(model)
    patch(other, compiled["sparse"].package, recall="pattern")
    assert [a.data_ptr() for a in model.parameters()] == [b.data_ptr() for b in other.parameters()]
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "surgeon")


def test_a_passkey_stands_at_its_depth_in_a_prompt_of_its_length() -> None:
    tokenizer = letters()
    filler = torch.full((1, 200), tokenizer.convert_tokens_to_ids("x"))
    tasks = passkeys(tokenizer, [filler], (40, 200), trials=2)
    assert [(task.length, task.depth) for task in tasks] == [(200, depth) for depth in DEPTHS for _ in range(2)]
    for task in tasks:
        assert len(task.prompt) + len(task.answer) == 200
        answer = "".join(tokenizer.convert_ids_to_tokens(task.answer))
        prompt = "".join(tokenizer.convert_ids_to_tokens(task.prompt))
        assert prompt.count(answer.strip()) == 2
        assert prompt.endswith("The secret number is")
        before, after = prompt.index("\n"), prompt.rindex("x") - prompt.rindex("\n\nx") - 1
        assert before / (before + after) == pytest.approx(task.depth, abs=0.02)
    assert len({tuple(task.answer.tolist()) for task in tasks}) == len(tasks)


def test_a_number_counts_as_found_exactly_where_greedy_decoding_writes_it() -> None:
    model = tiny_llama()
    prompt = tokens(1, 30)
    written = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 30:]
    right = retrieve(model, Passkey(33, 0.5, prompt[0], written))
    assert right.found
    with torch.no_grad():
        logits = model(torch.cat([prompt[0], written])[None]).logits[0, 29:-1].double()
    expected = torch.log_softmax(logits, dim=-1).gather(1, written[:, None]).mean()
    assert right.log_probability == pytest.approx(float(expected), rel=1e-5)
    for place in range(3):
        wrong = written.clone()
        wrong[place] = (wrong[place] + 1) % VOCABULARY
        assert not retrieve(model, Passkey(33, 0.5, prompt[0], wrong)).found


def test_retrieval_is_counted_by_length_and_depth(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    model, prompt = tiny_llama(), tokens(1, 30)
    written = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, 30:]
    hit, miss = Passkey(32, 0.1, prompt[0], written), Passkey(32, 0.1, prompt[0], written.flip(0) + 1)
    dense, _ = piloted(compiled["dense"], sequences[:1], (hit, miss, dataclasses.replace(hit, depth=0.9)))
    assert [(cell.depth, cell.tried, cell.found) for cell in dense.passkeys] == [(0.1, 2, 1), (0.9, 1, 1)]
    assert dense.passkeys_found == ratio([1, 0, 1], [1, 1, 1])


def test_losses_that_are_no_numbers_are_refused(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    dense = tiny_llama()
    other = tiny_llama()
    torch.nn.init.constant_(other.lm_head.weight, math.inf)
    with pytest.raises(ModelError):
        run_pilot([Candidate("dense", dense, None, 1.0), Candidate("patched", other, None, 0.5)], sequences, (), 1)


def test_a_median_has_an_error_that_one_disturbed_round_leaves_alone() -> None:
    quiet, disturbed = middle([1.0, 1.1, 0.9, 1.05, 0.95]), middle([1.0, 1.1, 0.9, 1.05, 50.0])
    assert quiet.value == 1.0
    assert disturbed.value == 1.05
    assert quiet.error == pytest.approx(math.sqrt(math.pi / 2) * 1.4826 * 0.05 / math.sqrt(5))
    assert disturbed.error == pytest.approx(quiet.error)
    assert middle([2.0]).error is None


def example(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> Pilot:
    columns = piloted(compiled["sparse"], sequences[:2])
    return Pilot(
        model="tiny",
        weights_sha256=fingerprint(tiny_llama()),
        package_id=HASH,
        length=LENGTH,
        texts=(PilotText("a.txt", HASH, 2),),
        machine=PilotMachine("a processor", "cpu", "fp32", 1, "2", "5", "2026-01-01"),
        columns=columns,
        thresholds=(),
        seconds=1.0,
    )


def test_the_file_holds_all_and_nothing_else_is_read(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor]
) -> None:
    pilot = example(compiled, sequences)
    assert Pilot.from_json(pilot.to_json()) == pilot
    whole = json.loads(pilot.to_json())

    def broken(change: dict[str, Any]) -> str:
        return json.dumps(whole | change)

    for text, where in (
        ("{", "pilot: line 1 column 2: expected JSON"),
        ("[]", "pilot: expected an object"),
        (broken({"version": 2}), "pilot: version: expected 1, got 2"),
        (broken({"version": 2, "surgeon": "9.1"}), "pilot: version: expected 1, got 2, as surgeon '9.1' writes it"),
        (broken({"surgeon": 2}), "pilot: surgeon: expected a value of type str, got 2"),
        (broken({"more": 1}), "pilot: expected the keys"),
        (broken({"length": "96"}), "pilot: length: expected a value of type int"),
        (broken({"seconds": math.nan}), "pilot: seconds: expected a finite number, got nan"),
        (broken({"columns": whole["columns"][1:]}), "pilot: columns: expected the dense model first"),
        (broken({"columns": []}), "pilot: columns: expected the dense model first"),
        (broken({"columns": whole["columns"][:1] * 2}), "pilot: columns: expected figures beside the dense model"),
    ):
        with pytest.raises(PilotError, match=where):
            Pilot.from_json(text)


def test_thresholds_and_changed_weights_decide(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    pilot = example(compiled, sequences)
    beside = pilot.columns[1].against_dense
    assert beside is not None
    quality, speed = beside.perplexity_ratio.value, beside.first_token_speedup.value
    assert judged(beside, {"perplexity_ratio": None}) == ()
    reached = {"perplexity_ratio": quality, "first_token_speedup": speed}
    assert [each.met for each in judged(beside, reached)] == [True, True]
    missed = judged(beside, {"perplexity_ratio": quality * 0.99, "first_token_speedup": speed * 1.01})
    assert [(each.found, each.met) for each in missed] == [(quality, False), (speed, False)]
    assert pilot.passed
    assert not dataclasses.replace(pilot, thresholds=missed[:1]).passed
    changed = dataclasses.replace(pilot.columns[1], weights_sha256=HASH)
    assert not dataclasses.replace(pilot, columns=(pilot.columns[0], changed)).passed
