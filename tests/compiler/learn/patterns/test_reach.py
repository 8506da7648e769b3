"""The size of blocks where none is asked for: the largest that leaves a row enough of them to choose a window from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.compiler.learn.patterns.reach import suited_block


@pytest.mark.parametrize(
    ("density", "length", "measured", "expected"),
    [
        (0.5, 2048, None, 64),
        (0.25, 2048, None, 32),
        (0.15, 2048, None, 16),
        (0.1, 2048, None, 16),
        (0.01, 2048, None, 16),
        (0.25, 8192, None, 64),
        (0.25, 8192, 2048, 32),
        (0.125, 4096, 2048, 16),
        (1.0, 2048 + 32, None, 32),
        (1.0, 2048 + 16, None, 16),
        (1.0, 2048, 2048 - 32, 32),
    ],
)
def test_it_is_the_largest_of_which_a_row_reads_six(
    density: float, length: int, measured: int | None, expected: int
) -> None:
    assert suited_block(density, length, measured) == expected


@given(st.floats(1e-6, 1), st.integers(1, 2**20), st.none() | st.integers(1, 2**20))
def test_only_the_smallest_need_not_fit(density: float, length: int, measured: int | None) -> None:
    shortest = min(length, measured or length)
    fitting = [
        size
        for size in (16, 32, 64)
        if math.gcd(length, shortest) % size == 0 and density * (shortest // size + 1) / 2 >= 6
    ]
    assert suited_block(density, length, measured) == max(fitting, default=16)
