"""The one table of a pilot's figures relative to the dense model, and the limits that may be set for them."""

from dataclasses import fields

import pytest

from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot.figures import FIGURES, LIMITS, AgainstDense
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Threshold, judged

VALUES = {name: float(index) for index, name in enumerate(FIGURES, start=1)}
FOUND = AgainstDense(**{name: Estimate(value, None) for name, value in VALUES.items()}, worst_task="keys")


def test_the_table_is_that_of_the_file() -> None:
    assert {*FIGURES, "worst_task"} == {field.name for field in fields(AgainstDense)}
    assert {name: FOUND.estimate(name) for name in FIGURES} == {name: Estimate(v, None) for name, v in VALUES.items()}
    assert {figure.follows for figure in FIGURES.values()} <= {field.name for field in fields(Column)}


@pytest.mark.parametrize(
    ("figure", "better"), [("continuation_ratio", -1), ("continuation_divergence", -1), ("first_token_speedup", 1)]
)
def test_a_limit_is_met_up_to_itself(figure: str, better: int) -> None:
    value = VALUES[figure]
    for limit, met in ((value, True), (value - better * 0.01, True), (value + better * 0.01, False)):
        (threshold,) = judged(FOUND, {figure: limit})
        assert threshold == Threshold(LIMITS[figure].name, LIMITS[figure].bound, limit, value, met)


def test_a_figure_that_has_no_limit_is_not_judged() -> None:
    assert judged(FOUND, dict.fromkeys(LIMITS)) == ()
    with pytest.raises(KeyError):
        judged(FOUND, {"divergence": 1.0})


def test_the_worst_task_is_named() -> None:
    (threshold,) = judged(FOUND, {"worst_retrieval": 100.0})
    assert threshold.figure == f"{LIMITS['worst_retrieval'].name} keys"
    assert not threshold.met
