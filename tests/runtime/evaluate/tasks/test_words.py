"""Tasks with words: the expected ones are those that the text has most often."""

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from surgeon.runtime.evaluate.tasks.plan import Plan
from surgeon.runtime.evaluate.tasks.words import common_words, frequent_words


@pytest.mark.parametrize(("make", "least"), [(common_words, 12), (frequent_words, 7)])
def test_the_three_most_common_words_are_asked_for(make: Callable[[random.Random], Plan], least: int) -> None:
    plan = make(random.Random(3))
    lists = [fact.text.strip().partition(": ")[2] for fact in plan.facts]
    counts = Counter(re.findall(r"[a-z]+", " ".join(lists)))
    *first, fourth = counts.most_common(4)
    (query,) = plan.queries
    assert {word for word, _ in first} == set(query.expected)
    assert first[-1][1] >= least > 2 * fourth[1]
    assert query.score(" " + ", ".join(query.expected[:2]) + f", and {query.expected[2]}.") == 1
    assert make(random.Random(3)) == plan != make(random.Random(4))
