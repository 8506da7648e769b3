"""All tasks by name, and one plan of each."""

import random

from surgeon.runtime.evaluate.tasks.numbers import (
    KEYS,
    QUERIES,
    SINGLE,
    TRACKING,
    VALUES,
    several_keys,
    several_values,
    single_numbers,
    variable_tracking,
)
from surgeon.runtime.evaluate.tasks.plan import Plan
from surgeon.runtime.evaluate.tasks.words import COMMON, FREQUENT, common_words, frequent_words

TASKS = (SINGLE, KEYS, QUERIES, VALUES, TRACKING, COMMON, FREQUENT)


def every_task(drawn: random.Random) -> tuple[Plan, ...]:
    """One plan of every task, single numbers at every depth; several keys and several queries share one."""
    others = (several_keys, several_values, variable_tracking, common_words, frequent_words)
    return (*single_numbers(drawn), *(plan(drawn) for plan in others))
