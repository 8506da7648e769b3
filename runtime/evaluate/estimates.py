"""Figures with standard errors, estimated from measurements on several sequences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_MEDIAN = math.sqrt(math.pi / 2)  # the standard error of a normal sample's median over that of its mean


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over the sequences, None if there is only one sequence."""

    value: float
    error: float | None


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """The total of the sums over the total of the counts, with its standard error over sequences of this kind."""
    value = math.fsum(sums) / math.fsum(counts)
    if len(sums) == 1:
        return Estimate(value, None)
    squares = math.fsum((total - value * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(squares * len(sums) / (len(sums) - 1)) / math.fsum(counts))


def exponential(mean: Estimate) -> Estimate:
    """The exponential of the figure; the error is propagated to first order."""
    value = math.exp(mean.value)
    return Estimate(value, None if mean.error is None else value * mean.error)


def middle(values: Sequence[float]) -> Estimate:
    """The median. Its error comes from the median absolute deviation, which one outlier hardly changes."""
    value = statistics.median(values)
    if len(values) == 1:
        return Estimate(value, None)
    deviation = statistics.median(abs(each - value) for each in values)
    return Estimate(value, _MEDIAN * _NORMAL * deviation / math.sqrt(len(values)))
