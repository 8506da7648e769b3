"""The speed of kernels beside torch's dense attention where every block is seen, as `make rates` measured it.

Both depend on the processor: torch multiplies 16-bit matrices several times as fast where there is a matrix unit.
"""

import json
from collections.abc import Collection, Mapping
from functools import cache
from math import log
from pathlib import Path

FILE = Path(__file__).with_name("rates.json")
LEVELS = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512f", "avx2": "avx2"}
"""The best that torch's products can use, best first, and the processor's feature that tells it."""
VARIANTS = ("x86_64_amx", "x86_64_v4", "x86_64_v3", "portable")
"""The variants that were measured, fastest first."""
DECODE = {True: "decode", False: "decode-mha"}
"""One query behind many keys, where query heads share KV heads and where not; other calls are named by their length."""

Rates = Mapping[str, Mapping[str, float]]
"""Torch's time over a kernel's, by dtype and call."""


@cache
def processor_features() -> frozenset[str]:
    """The features that Linux names; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def processor_level(features: Collection[str], without: Collection[str] = ()) -> str:
    """The best level of LEVELS that a processor has, those left out that it is not allowed to use; else "other"."""
    levels = (level for level, feature in LEVELS.items() if feature in features and level not in without)
    return next(levels, "other")


def rates_of(variant: str, level: str) -> Rates:
    """A variant's rates on processors of a level, or of the next below it that was measured; none for another variant.

    Where no level below was measured, the lowest one counts.
    """
    measured = _measured()
    names = [name for name in LEVELS if name in measured]
    order = list(LEVELS)
    below = [name for name in names if level in order and order.index(name) >= order.index(level)]
    for name in below or names[-1:]:
        if variant in measured[name]:
            found: Rates = measured[name][variant]
            return found
    return {}


def rate_of(rates: Rates, dtype: str, queries: int, keys: int, grouped: bool = True) -> float:
    """The rate of the measured call that is nearest in length; 1 where none was.

    `grouped` is whether query heads share KV heads.
    """
    calls = rates.get(dtype, {})
    if queries == 1 and DECODE[grouped] in calls:
        return calls[DECODE[grouped]]
    lengths = [int(call) for call in calls if call not in DECODE.values()]
    return calls[str(min(lengths, key=lambda length: abs(log(length / max(keys, 1)))))] if lengths else 1.0


@cache
def _measured() -> dict[str, dict[str, Rates]]:
    found: dict[str, dict[str, Rates]] = json.loads(FILE.read_text(encoding="utf-8"))["levels"]
    return found
