"""The learned topologies' scores on held-out text: the committed ones meet the bars and belong to the topologies."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

import learn
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime.evaluate.comparison import Comparison, Departure

ROWS: list[dict[str, Any]] = json.loads(learn.RESULTS.read_text(encoding="utf-8"))["rows"]
ANSWERS: list[dict[str, Any]] = json.loads(learn.ANSWERS.read_text(encoding="utf-8"))["rows"]
CASES = {case.name: case for case in learn.CASES}


@dataclass(frozen=True)
class Bar:
    """The upper limits for a topology's means over the texts, and for its worst text."""

    ratio: float
    relative: float
    worst: float


BARS = {
    "smollm2-135m-50": Bar(1.03, 0.65, 1.05),
    "smollm2-135m-35": Bar(1.06, 0.55, 1.0),
    "smollm2-135m-25": Bar(1.12, 0.50, 0.85),
    "smollm2-135m-15": Bar(1.20, 0.60, 0.95),
    "smollm2-135m-22-4096": Bar(math.inf, 0.75, math.inf),
    "smollm2-135m-25-answers": Bar(1.008, 0.70, 1.0),
    "smollm2-135m-15-answers": Bar(1.012, 0.65, 1.0),
    "smollm2-135m-10-answers": Bar(1.022, 0.60, 1.0),
}


@pytest.mark.parametrize("row", [*ROWS, *ANSWERS], ids=lambda row: str(row["topology"]))
def test_a_committed_row_meets_its_bar_and_is_of_the_topology_that_lies_here(row: dict[str, Any]) -> None:
    bar = BARS.get(row["topology"], Bar(math.inf, 1.0, math.inf))
    assert row["ratio"] <= bar.ratio
    assert row["relative"] <= bar.relative
    assert row["worst_relative"] <= bar.worst
    assert len(row["texts"]) == 2
    case = CASES[row["topology"]]
    most = case.sequences or learn.TOKENS_SCORED // row["length"]
    assert all(text["sequences"] == most for text in row["texts"])
    assert (row["model"], row["length"], row["block_size"]) == (case.checkpoint.name, case.length, case.block)
    topology = read_topology(learn.FOLDER / "topologies" / f"{row['topology']}.json")
    assert row["density"] == pytest.approx(mean_density(topology), abs=1e-9)
    assert topology.block_size * topology.num_blocks == row["length"]


def test_the_quarter_is_scored() -> None:
    assert "smollm2-135m-25" in {row["topology"] for row in ROWS}
    assert "smollm2-135m-25-answers" in {row["topology"] for row in ANSWERS}


def comparison(*divergences: float) -> Comparison:
    return Comparison(tuple(Departure(10, 20.0, 21.0, found, 2, 0.0, 5) for found in divergences))


def test_a_score_is_relative_to_equal_windows() -> None:
    found = learn.scored("text", comparison(1.0, 2.0), comparison(2.0, 8.0))
    assert (found.sequences, found.relative) == (2, pytest.approx(0.3))
    assert found.relative_error == pytest.approx(0.125)
    assert found.ratio == pytest.approx(math.exp(0.1))
    assert learn.scored("text", comparison(1.0), comparison(2.0)).relative_error is None


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learn.main(["smollm2-135m-99"])
    assert "expected names of smollm2-135m-50" in capsys.readouterr().err
