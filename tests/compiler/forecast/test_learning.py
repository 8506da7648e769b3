"""The forecasts of learning and assessing, held against what was measured."""

import pytest

from models import tiny_config
from surgeon.compiler.forecast.learning import (
    Counts,
    assessing_stages,
    descending_stages,
    learning_memory,
    learning_stages,
)
from surgeon.compiler.learn.measure.attending import KEPT_BYTES, activation_bytes

THREE_TEXTS = Counts(calibrate=6, validate=3, refine=(3, 3, 3))


def prompts(stages: object) -> float:
    return sum(stage.seconds for stage in stages)  # type: ignore[attr-defined]


def test_learning_takes_as_many_prompts_as_were_measured() -> None:
    assert prompts(learning_stages(THREE_TEXTS, 1.0)) == pytest.approx(121.5, abs=4), "120 to 123 in learning-cost.json"
    assert prompts(learning_stages(THREE_TEXTS, 2.0)) == 2 * prompts(learning_stages(THREE_TEXTS, 1.0))


def test_an_assessment_takes_a_fraction_of_it_and_descent_several_times_it() -> None:
    learning = prompts(learning_stages(THREE_TEXTS, 1.0))
    assert prompts(assessing_stages(Counts(3, 3, ()), 1.0)) < learning / 4
    descents = Counts(6, 3, (3, 3, 3), descents=60)
    assert prompts(descending_stages(descents, 1.0)) == pytest.approx(108 / 15 * 90, rel=0.1), "minutes, by README"


def test_cuts_have_stages_of_their_own() -> None:
    without, added = learning_stages(THREE_TEXTS, 1.0), learning_stages(Counts(6, 3, (3, 3, 3), cuts=3), 1.0)
    assert added[: len(without)] == without
    assert [stage.name.split()[0] for stage in added[len(without) :]] == ["looking", "comparing", "validating"]


@pytest.mark.parametrize(
    ("shape", "parameters", "peak"),
    [
        ((30, 576, 1536, 9, 49152), 134_515_008, 4.67e9),
        ((24, 896, 4864, 14, 151936), 630_167_424, 6.08e9),
    ],
    ids=["SmolLM2-135M", "Qwen2.5-Coder-0.5B"],
)
def test_the_memory_is_near_what_was_measured(shape: tuple[int, ...], parameters: int, peak: float) -> None:
    layers, hidden, inner, heads, vocabulary = shape
    config = tiny_config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )
    assert learning_memory(config, parameters, 2048) == pytest.approx(peak, rel=0.15)


def test_memory_stops_growing_where_layers_are_computed_again() -> None:
    config = tiny_config(num_hidden_layers=30, hidden_size=576, intermediate_size=1536)
    assert activation_bytes(config, 2048) <= KEPT_BYTES < activation_bytes(config, 4096)
    assert learning_memory(config, 0, 4096) < learning_memory(config, 0, 2048)
