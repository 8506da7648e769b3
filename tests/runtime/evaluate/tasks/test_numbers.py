"""Tasks with numbers: what is asked for is what the facts say, and nothing else in the text says it."""

import random
import re

import pytest

from surgeon.runtime.evaluate.tasks.numbers import (
    DEPTHS,
    several_keys,
    several_values,
    single_numbers,
    variable_tracking,
)
from surgeon.runtime.evaluate.tasks.plan import Plan


def text_of(plan: Plan) -> str:
    return "".join(fact.text for fact in sorted(plan.facts, key=lambda fact: fact.depth))


def test_a_single_number_stands_at_every_depth_alone() -> None:
    plans = single_numbers(random.Random(1))
    assert [(plan.facts[0].depth, plan.queries[0].depth) for plan in plans] == [(depth, depth) for depth in DEPTHS]
    for plan in plans:
        assert set(re.findall(r"\d+", text_of(plan))) == set(plan.queries[0].expected)
        assert not re.search(r"\d", plan.queries[0].text)
    assert len({plan.queries[0].expected for plan in plans}) == len(DEPTHS)


def test_keys_are_asked_for_one_by_one_and_in_pairs() -> None:
    plan = several_keys(random.Random(1))
    stated = dict(re.findall(r"magic number for (\w+) is: (\d+)\.", text_of(plan)))
    assert len(stated) == len(set(stated.values())) == len(DEPTHS)
    for query in plan.queries:
        keys = re.findall(r"[a-z]+", query.text.rpartition(" for ")[2].partition(" is:")[0].partition(" are:")[0])
        assert query.expected == tuple(stated[key] for key in keys if key != "and")
        assert query.depth is None or stated[keys[0]] in plan.facts[DEPTHS.index(query.depth)].text
    assert [len(query.expected) for query in plan.queries] == [1, 1, 1, 1, 1, 2, 2]


def test_all_values_of_a_key_are_asked_for() -> None:
    plan = several_values(random.Random(1))
    stated: dict[str, list[str]] = {}
    for key, number in re.findall(r"numbers for (\w+) is: (\d+)\.", text_of(plan)):
        stated.setdefault(key, []).append(number)
    for query in plan.queries:
        (key,) = set(re.findall(r"numbers for (\w+)", query.text))
        assert query.expected == tuple(stated[key])
        assert len(query.expected) == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_end_of_a_chain_is_two_hops_from_its_number(seed: int) -> None:
    plan = variable_tracking(random.Random(seed))
    stated = dict(re.findall(r"The value of (\w+) is (.+)\.", text_of(plan)))
    for query in plan.queries:
        (name,) = set(re.findall(r"value of (\w+)", query.text))
        hops, value = 0, stated[name]
        while not value.isdigit():
            hops, value = hops + 1, stated[value.removeprefix("the value of ")]
        assert (query.expected, hops) == ((value,), 2)
