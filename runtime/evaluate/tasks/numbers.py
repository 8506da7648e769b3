"""Tasks that ask for hidden numbers: one, one of several keys, several at once, and through a chain of names.

Source: RULER (Hsieh et al. 2024), needles in a haystack and variable tracking.
"""

import random
from collections.abc import Sequence

from surgeon.runtime.evaluate.tasks.plan import Fact, Plan, Query
from surgeon.runtime.evaluate.tasks.vocabulary import WORDS

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
SINGLE = "single number"
KEYS = "several keys"
QUERIES = "several queries"
VALUES = "several values"
TRACKING = "variable tracking"

_MAGIC = "\n\nThe special magic number for {} is: {}.\n\n"
_ONE_OF = "\n\nOne of the special magic numbers for {} is: {}.\n\n"
_VALUE = "\n\nThe value of {} is {}.\n\n"


def single_numbers(drawn: random.Random) -> tuple[Plan, ...]:
    """One number at each depth, in a text without others."""
    plans = []
    for depth in DEPTHS:
        (number,) = _numbers(drawn, 1)
        fact = Fact(f"\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n", depth)
        query = Query(SINGLE, depth, "\n\nWhat is the pass key? The pass key is", (number,))
        plans.append(Plan((fact,), (query,)))
    return tuple(plans)


def several_keys(drawn: random.Random) -> Plan:
    """A number for each of five keys, one at each depth: each is asked for on its own, and two pairs at once."""
    keys, numbers = drawn.sample(WORDS, len(DEPTHS)), _numbers(drawn, len(DEPTHS))
    facts = tuple(Fact(_MAGIC.format(key, number), d) for key, number, d in zip(keys, numbers, DEPTHS, strict=True))
    single = [
        Query(KEYS, depth, f"\n\nWhat is the special magic number for {key}? {_about([key])} is:", (number,))
        for key, number, depth in zip(keys, numbers, DEPTHS, strict=True)
    ]
    order = drawn.sample(range(len(keys)), 4)
    pairs = []
    for one, other in (order[:2], order[2:]):
        asked = [keys[one], keys[other]]
        text = f"\n\nWhat are the special magic numbers for {' and '.join(asked)}? {_about(asked)} are:"
        pairs.append(Query(QUERIES, None, text, (numbers[one], numbers[other])))
    return Plan(facts, (*single, *pairs))


def several_values(drawn: random.Random) -> Plan:
    """Three numbers for each of two keys, in turn: all of a key's are asked for."""
    keys, numbers = drawn.sample(WORDS, 2), _numbers(drawn, 6)
    facts = tuple(Fact(_ONE_OF.format(keys[i % 2], number), (i + 0.5) / 6) for i, number in enumerate(numbers))
    queries = [
        Query(
            VALUES,
            None,
            f"\n\nWhat are all the special magic numbers for {key} mentioned in the text? {_about([key])} mentioned"
            " in the text are:",
            tuple(numbers[index::2]),
        )
        for index, key in enumerate(keys)
    ]
    return Plan(facts, tuple(queries))


def variable_tracking(drawn: random.Random) -> Plan:
    """Two chains of three names: the first has a number, each other one the value of the one before it."""
    names, numbers = drawn.sample(WORDS, 6), _numbers(drawn, 2)
    values = [*numbers, *(f"the value of {name}" for name in names[:4])]
    facts = [Fact(_VALUE.format(*pair), (i + 0.5) / 6) for i, pair in enumerate(zip(names, values, strict=True))]
    queries = [
        Query(
            TRACKING,
            None,
            f"\n\nQuestion: What number is the value of {name} in the text above?\nAnswer: The value of {name} is the"
            " number",
            (number,),
        )
        for name, number in zip(names[4:], numbers, strict=True)
    ]
    return Plan(tuple(facts), tuple(queries))


def _about(keys: Sequence[str]) -> str:
    return f"The special magic number{'s' * (len(keys) > 1)} for {' and '.join(keys)}"


def _numbers(drawn: random.Random, count: int) -> list[str]:
    return [str(number) for number in drawn.sample(range(10_000, 100_000), count)]
