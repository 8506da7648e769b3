"""The forecast of a pilot, held against three that were measured."""

import pytest

from models import tiny_config
from surgeon.compiler.forecast.pilot import pilot_forecast
from surgeon.compiler.system.stages import Forecast

SECONDS = {"dense": 4.104, "patched": 3.017, "window": 2.997}


def forecast(others: tuple[str, ...], sequences: int = 12, passkeys: int = 40, rounds: int = 6) -> Forecast:
    config = tiny_config(hidden_size=576, vocab_size=49152)
    return pilot_forecast(config, 134_515_008, SECONDS.__getitem__, others, sequences, passkeys, rounds)


def test_a_pilot_of_smollm2_takes_what_it_took() -> None:
    found = forecast(("patched", "window"))
    assert found.seconds == pytest.approx(633.5, rel=0.1), "seconds in pilot-smollm2-135m-25.json"
    assert found.memory_bytes == pytest.approx(1.289e9, rel=0.2)


def test_each_part_has_its_stage() -> None:
    names = [stage.name for stage in forecast(("patched", "window")).stages]
    assert names == ["quality: patched", "quality: window", "passkeys", "speed", "cache and weights"]
    assert "passkeys" not in [stage.name for stage in forecast(("patched",), passkeys=0).stages]
    assert forecast(("patched",)).seconds < forecast(("patched", "window")).seconds
    assert forecast(("patched",), rounds=12).seconds > forecast(("patched",)).seconds
