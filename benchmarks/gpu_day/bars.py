"""The bars of a day: what the kernels must reach, and what the rows say that they reach."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measure.checked import TOLERANCE

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """One bar: its bound, a lower one unless `at_most`, and the worst row, None if no row was measured."""

    what: str
    bound: float
    found: float | None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """True if it was measured and reached."""
        if self.found is None:
            return False
        return self.found < self.bound if self.at_most else self.found >= self.bound


def bars(stages: Mapping[str, Mapping[str, Any]], longest_first: Sequence[int] = (32768,)) -> tuple[Bar, ...]:
    """Judges a day's stages; prefills are judged at the first of these lengths, which is the most important one."""
    smoke, speed = (stages.get(name, {}).get("rows", []) for name in ("smoke", "speed"))
    every = [row for found in stages.values() for row in found["rows"]]
    prefill = [row for row in speed if row["phase"] == "prefill" and row["length"] == longest_first[0]]
    sparse = [row for row in prefill if row["density"] <= 0.5]
    dense = [row for row in speed if row["density"] == 1]
    decode = [row for row in speed if row["phase"] == "decode"]
    where = f"prefill of {longest_first[0]:,} tokens"
    return (
        Bar("largest error against fp64", TOLERANCE, _worst(max, _errors(every)), at_most=True),
        Bar(f"{where}, half the blocks or fewer: SDPA's time x density", 0.9, _least(sparse, "times_sdpa_x_density")),
        Bar(f"{where}: effective TFLOP/s on the blocks read", 450, _least(prefill, "tflops")),
        Bar(f"{where} beside FlexAttention", 1.0, _least(prefill, "times_flex")),
        Bar("decoding beside FlexAttention", 1.3, _least(decode, "times_flex")),
        Bar("all blocks, beside SDPA", 0.97, _least(dense, "times_sdpa")),
        Bar("a package's load and first call, in seconds", 1.0, _worst(max, _named(smoke, "first_call_s")), True),
    )


def _errors(rows: Rows) -> Iterator[float]:
    for name in ("error", "prefill_error", "decode_error"):
        yield from _named(rows, name)


def _named(rows: Rows, name: str) -> Iterator[float]:
    return (float(row[name]) for row in rows if name in row)


def _least(rows: Rows, name: str) -> float | None:
    return _worst(min, _named(rows, name))


def _worst(of: Any, values: Iterable[float]) -> float | None:
    found: float | None = of(values, default=None)
    return found
