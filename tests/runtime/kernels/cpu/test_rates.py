"""The rates that were measured: what they must hold for whatever decides by them."""

import json

import pytest

from surgeon.runtime.kernels.cpu.rates import DECODE, FILE, LEVELS, VARIANTS, rate_of, rates_of
from surgeon.runtime.package.target import DTYPES


@pytest.mark.parametrize("level", LEVELS)
def test_every_variant_of_a_level_was_measured_in_every_dtype(level: str) -> None:
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    variants = VARIANTS if level == "amx" else VARIANTS[2:] if level == "avx2" else VARIANTS[1:]
    assert tuple(stored["levels"][level]) == variants
    assert stored["measured"][level]["processor"]
    for variant in variants:
        for dtype in DTYPES:
            calls = rates_of(variant, level)[dtype]
            assert set(DECODE.values()) < set(calls)
            assert all(0.01 < rate < 100 for rate in calls.values())


def test_a_call_takes_the_rate_of_the_nearest_one() -> None:
    rates = {"fp32": {"decode": 3.0, "64": 2.0, "1024": 1.0}}
    assert rate_of(rates, "fp32", 1, 5000) == 3.0
    assert rate_of(rates, "fp32", 1, 255, grouped=False) == 2.0
    assert rate_of(rates, "fp32", 2, 257) == 1.0
    assert rate_of(rates, "fp32", 2, 0) == 2.0
    assert rate_of(rates, "bf16", 2, 257) == 1.0


def test_with_a_matrix_unit_no_prefill_in_bf16_is_left_to_torch() -> None:
    calls = rates_of("x86_64_amx", "amx")["bf16"]
    assert min(rate for call, rate in calls.items() if call not in DECODE.values()) > 1.0
    assert rates_of("x86_64_v4", "amx")["bf16"]["4096"] < 1.0
