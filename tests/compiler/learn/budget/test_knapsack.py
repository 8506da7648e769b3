"""The sharing of a budget among heads, against exhaustive search."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from surgeon.compiler.learn.budget.knapsack import allocate
from surgeon.runtime.errors import TopologyError

Numbers = npt.NDArray[np.float64]


def cost_of(costs: Sequence[Numbers], choices: Sequence[int]) -> float:
    return sum(float(cost[choice]) for cost, choice in zip(costs, choices, strict=True))


def cheapest(blocks: Sequence[Numbers], costs: Sequence[Numbers], budget: float) -> float:
    """The least cost of all combinations within the budget."""
    every = itertools.product(*(range(len(size)) for size in blocks))
    return min(cost_of(costs, choices) for choices in every if cost_of(blocks, choices) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_convex_costs_in_equal_steps_are_shared_as_exhaustive_search_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [np.arange(1.0, 6.0)] * 4
    costs = [9.0 - np.cumsum([0.0, *np.sort(rng.random(4))[::-1]]) for _ in blocks]
    for budget in range(4, 21):
        found = allocate(blocks, costs, budget)
        assert cost_of(blocks, found) <= budget
        assert cost_of(costs, found) == pytest.approx(cheapest(blocks, costs, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_costs_nothing_within_what_was_spent_is_cheaper_but_for_the_last_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [np.sort(rng.choice(np.arange(1.0, 12.0), size=4, replace=False)) for _ in range(4)]
    costs = [rng.normal(size=4) for _ in blocks]
    steps = max(float(np.ptp(cost)) for cost in costs)
    for budget in np.linspace(sum(size[0] for size in blocks), sum(size[-1] for size in blocks), 7):
        found = allocate(blocks, costs, float(budget))
        assert cost_of(blocks, found) <= budget
        assert cost_of(costs, found) <= cheapest(blocks, costs, float(budget)) + steps
    everything = allocate(blocks, costs, 1e9)
    assert cost_of(costs, everything) == pytest.approx(cheapest(blocks, costs, 1e9), abs=1e-12)


def test_a_choice_with_more_blocks_for_a_greater_cost_is_not_taken() -> None:
    assert allocate([np.array([1.0, 2.0, 3.0])], [np.array([1.0, 4.0, 1.5])], 99) == (0,)


def test_a_step_that_does_not_fit_leaves_the_budget_to_the_next_best() -> None:
    blocks = [np.array([1.0, 10.0]), np.array([1.0, 3.0])]
    assert allocate(blocks, [np.array([9.0, 0.0]), np.array([1.0, 0.0])], 5) == (0, 1)


def test_a_budget_below_the_smallest_choices_is_an_error() -> None:
    with pytest.raises(TopologyError, match=r"expected a budget of at least 4 .*, got 3"):
        allocate([np.array([2.0, 5.0])] * 2, [np.array([1.0, 0.0])] * 2, 3)
