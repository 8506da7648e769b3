"""The extrapolation of one layer's times to a model, with made-up times, and the plan as lines."""

import pytest

from models import tiny_config
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.plan.estimate import Plan, plan_of
from surgeon.compiler.plan.layer import PlannedModel
from surgeon.compiler.plan.measure import Call, LayerTimes
from surgeon.compiler.plan.text import plan_lines

GRID = Grid(64, 32, 1, 0.25)


def times(dense: list[float], patched: list[float], bare: list[float]) -> LayerTimes:
    """A layer's times; the rest of a one-layer model takes half a second."""

    def calls(layers: list[float], rest: float) -> tuple[Call, ...]:
        return tuple(Call(layer + rest, layer) for layer in layers)

    prompts = {name: calls(each, 0.5) for name, each in (("dense", dense), ("patched", patched), ("bare", bare))}
    steps = {"dense": calls([0.02] * 3, 0.1), "patched": calls([0.01] * 3, 0.1)}
    return LayerTimes(prompts, steps, density=0.249, recall="dense", dense_cache_bytes=1000, kept_cache_bytes=250)


def plan(dense: list[float], patched: list[float], bare: list[float], layers: int = 10) -> Plan:
    config = tiny_config(num_hidden_layers=layers, max_position_embeddings=4096)
    return plan_of(PlannedModel("a model", config, 1_000_000), GRID, times(dense, patched, bare))


def test_a_layer_counts_as_often_as_the_model_has_it_and_the_rest_once() -> None:
    found = plan([0.8] * 3, [0.5] * 3, [0.4] * 3)
    assert found.first_token.dense.value == pytest.approx(0.5 + 10 * 0.8)
    assert found.first_token.patched.value == pytest.approx(0.5 + 10 * 0.5)
    assert found.first_token.times.value == pytest.approx(8.5 / 5.5)
    assert found.attention.dense.value == pytest.approx(4.0)
    assert found.attention.patched.value == pytest.approx(1.0)
    assert found.decoded_token.dense.value == pytest.approx(0.3)
    assert found.decoded_token.times.value == pytest.approx(1.5)
    assert (found.cache.dense.value, found.cache.patched.value) == (10_000, 2_500)
    assert (found.length, found.density, found.rounds) == (2048, 0.249, 3)


def test_attention_bounds_what_any_pattern_can_gain() -> None:
    found = plan([0.8] * 3, [0.5] * 3, [0.4] * 3)
    assert found.attention_share.value == pytest.approx(4.0 / 8.5)
    assert found.bound.value == pytest.approx(8.5 / 4.5)
    assert found.even_length == round(2048 * 4.5 / 4.0)


def test_a_figure_is_the_quotient_of_medians_with_the_error_of_the_rounds() -> None:
    found = plan([0.8, 0.9, 3.0], [0.4, 0.5, 0.45], [0.3, 0.3, 0.3])
    assert found.first_token.times.value == pytest.approx((0.5 + 9) / (0.5 + 4.5))
    assert found.first_token.times.error is not None
    assert found.first_token.times.error > 0
    assert plan([0.8] * 3, [0.4] * 3, [0.3] * 3).first_token.times.error == 0


def test_noise_that_makes_a_layer_without_attention_slower_ends_in_no_gain() -> None:
    found = plan([0.8] * 3, [0.81] * 3, [0.82] * 3)
    assert found.attention.patched.value < 1e-5
    assert found.attention_share.value == pytest.approx(0, abs=1e-6)
    assert found.bound.value < 1.01
    assert plan_lines(found, 2, "utf-8")[-1].startswith("little to gain: the first token 0.99 times as fast")


def test_the_needs_grow_with_the_prompt_the_layers_and_the_parameters() -> None:
    one, slower = plan([0.8] * 3, [0.5] * 3, [0.4] * 3), plan([1.6] * 3, [1.0] * 3, [0.8] * 3)
    assert one.assess.seconds < one.learn.seconds
    assert one.learn.seconds == pytest.approx(122 * one.first_token.dense.value, rel=0.05), "as README says"
    assert slower.learn.seconds / slower.first_token.dense.value == pytest.approx(
        one.learn.seconds / one.first_token.dense.value
    )
    assert slower.pilot.seconds > one.pilot.seconds
    larger = plan_of(PlannedModel("a model", tiny_config(), 2_000_000), GRID, times([0.8], [0.5], [0.4]))
    smaller = plan_of(PlannedModel("a model", tiny_config(), 1_000_000), GRID, times([0.8], [0.5], [0.4]))
    for name in ("assess", "learn", "pilot"):
        assert getattr(larger, name).memory_bytes - getattr(smaller, name).memory_bytes == pytest.approx(4e6)


@pytest.mark.parametrize(
    ("patched", "words"),
    [
        (0.5, "worth learning: the first token 1.55 times"),
        (0.7, "a small gain: the first token 1.13 times"),
        (0.8, "little"),
    ],
)
def test_the_verdict_is_one_line(patched: float, words: str) -> None:
    last = plan_lines(plan([0.8] * 3, [patched] * 3, [0.4] * 3), 2, "utf-8")[-1]
    assert last.startswith(words)
    assert "attention is 47% of it, so no pattern makes it more than 1.89 times as fast" in last
    assert last.endswith("at about 2,304 tokens, attention is half")


def test_the_verdict_says_when_the_context_is_too_short_and_when_attention_is_half_already() -> None:
    last = plan_lines(plan([0.8] * 3, [0.75] * 3, [0.7] * 3), 2, "utf-8")[-1]
    assert last.endswith("tokens, beyond the model's context of 4,096, attention is half")
    assert plan_lines(plan([0.8] * 3, [0.2] * 3, [0.1] * 3), 2, "utf-8")[-1].endswith("times as fast")


def test_noise_is_named_instead_of_a_gain() -> None:
    last = plan_lines(plan([0.8, 1.6, 1.0], [0.9, 0.5, 0.5], [0.4] * 3), 2, "utf-8")[-1]
    assert last.startswith("too noisy to tell, so ask again when the machine has nothing else to do: the first token ")


def test_the_table_is_aligned_and_plain_where_the_encoding_is() -> None:
    lines = plan_lines(plan([0.8, 0.81, 0.82], [0.5, 0.52, 0.51], [0.4] * 3), 1, "ascii")
    assert "".join(lines).isascii()
    assert lines[0] == "a model: llama, 10 layers, 1 million parameters; fp32, 1 CPU thread"
    gain, cost = (lines.index(""), lines.index("", lines.index("") + 1))
    assert lines[gain + 1] == f"{'':<26}{'dense':>10}{'patched':>10}   gain, times"
    assert lines[gain + 2].startswith(f"{'first token, s':<26}{'8.600':>10}{'5.600':>10}   1.54 +- ")
    assert lines[cost + 1 : cost + 3] == (
        f"{'with 3 texts, about':<26}{'time':>10}{'memory':>10}",
        f"{'surgeon assess':<26}{'4 min':>10}{'0.8 GB':>10}",
    )
