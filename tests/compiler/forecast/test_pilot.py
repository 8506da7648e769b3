"""The forecast of a pilot, held against three that were measured."""

import pytest

from models import tiny_config
from surgeon.compiler.forecast.pilot import pilot_forecast
from surgeon.compiler.system.stages import Forecast

SECONDS = {"dense": 4.104, "patched": 3.017, "window": 2.997}


def forecast(others: tuple[str, ...], sequences: int = 12, prompts: int = 40, rounds: int = 6) -> Forecast:
    config = tiny_config(hidden_size=576, vocab_size=49152)
    dense, *each = (SECONDS[name] for name in ("dense", *others))
    return pilot_forecast(config, 134_515_008, dense, each, sequences, prompts, rounds)


def test_a_pilot_of_smollm2_takes_about_what_it_took() -> None:
    """That pilot read its sequences once more, and asked for its numbers by logits."""
    found = forecast(("patched", "window"))
    assert found.seconds == pytest.approx(633.5, rel=0.2), "seconds of a pilot of 2026-11-24"
    assert found.memory_bytes == pytest.approx(1.289e9, rel=0.2)


def test_each_part_has_its_stage() -> None:
    names = [stage.name for stage in forecast(("patched", "window")).stages]
    assert names == ["prompts and continuations", "tasks: dense", "tasks", "speed", "cache and weights"]
    assert "tasks" not in [stage.name for stage in forecast(("patched",), prompts=0).stages]
    assert forecast(("patched",)).seconds < forecast(("patched", "window")).seconds
    assert forecast(("patched",), rounds=12).seconds > forecast(("patched",)).seconds
