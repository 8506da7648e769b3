"""Questions read in one call and token by token are counted side by side, a row for each topology."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

import committed
import token_by_token
from oracles import Oracle, filler, letters
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime.evaluate.tasks.prompts import make_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


class Distracted(Oracle):
    """Forgets the text when a token of a question comes alone."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **given: Any) -> CausalLMOutputWithPast:
        output = super().forward(input_ids, past_key_values, **given)
        is_decoding = output.logits[0, 0].argmax() != self._tokenizer.convert_tokens_to_ids("y")
        if input_ids.shape[1] == 1 and not is_decoding:
            output.past_key_values = output.past_key_values[-80:]
        return output


@pytest.mark.parametrize(("model", "hears_tokens"), [(Oracle(10_000), True), (Distracted(10_000), False)])
def test_both_ways_of_asking_are_counted(model: Oracle, hears_tokens: bool) -> None:
    prompts = make_prompts(letters(), [filler(1500)], (1500,), 1, tasks=token_by_token.TASKS)
    later = [prompt for prompt in prompts if not prompt.at_end]
    found = token_by_token.both_ways(model, letters(), later)
    assert set(found) == set(token_by_token.TASKS)
    for task, sums in found.items():
        asked = sum(question.query.task == task for prompt in later for question in prompt.questions)
        assert sums == {"questions": asked, "in_one_call": asked, "by_token": asked if hears_tokens else 0}


def test_a_topology_has_one_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for row in ({"topology": "b", "found": 1}, {"topology": "a", "found": 2}, {"topology": "b", "found": 3}):
        token_by_token.keep(file, row)
    assert json.loads(file.read_text(encoding="utf-8"))["rows"] == [
        {"topology": "a", "found": 2},
        {"topology": "b", "found": 3},
    ]


@pytest.mark.parametrize("row", committed.read("token-by-token")["rows"], ids=lambda row: str(row["topology"]))
def test_a_committed_row_is_of_the_topology_that_lies_here_and_loses_little_by_tokens(row: dict[str, Any]) -> None:
    assert row["topology_sha256"] == read_topology(committed.TOPOLOGIES / f"{row['topology']}.json").sha256
    for found in row["tasks"].values():
        assert found["by_token"] >= found["in_one_call"] - 0.1 * found["questions"]
