"""The times of one layer, of a tiny model."""

from pathlib import Path

import pytest

from models import tiny_config
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.plan import measure
from surgeon.compiler.plan.measure import Call, in_turn, measure_layer
from surgeon.runtime.errors import TopologyError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_layer_is_timed_dense_patched_and_without_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PROMPT_SECONDS", "_STEP_SECONDS", "_LARGER_THAN_A_CACHE"):
        monkeypatch.setattr(measure, name, 0)  # three rounds, with nothing to evict
    found = measure_layer(tiny_config(), Grid(16, 8, 1, 0.5), "pattern", tmp_path)
    assert found.prompts.keys() == {"dense", "patched", "bare"}
    assert found.steps.keys() == {"dense", "patched"}
    for calls in (*found.prompts.values(), *found.steps.values()):
        assert len(calls) >= 3
        assert all(0 < call.layer < call.whole for call in calls)
    assert 0.4 < found.density <= 0.5
    assert found.dense_cache_bytes == 2 * 2 * 128 * 32 * 4, "keys and values of two KV heads"
    assert 0 < found.kept_cache_bytes < found.dense_cache_bytes


def test_a_density_out_of_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="--density: expected at least"):
        measure_layer(tiny_config(), Grid(16, 8, 1, 0.1), "dense", tmp_path)


def test_calls_take_turns_and_each_is_prepared() -> None:
    order: list[str] = []

    def call(name: str) -> Call:
        order.append(name)
        return Call(1.0, 0.5)

    found = in_turn(
        {name: lambda name=name: call(name) for name in "abc"}, 1e9, 4, lambda done: order.append(str(done))
    )
    assert "".join(order) == "0a0b0c1b1c1a2c2a2b3a3b3c"
    assert {name: len(calls) for name, calls in found.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(in_turn({"a": lambda: call("a")}, 0.0, 9, lambda _: None)["a"]) == 3, "the time is used up at once"
