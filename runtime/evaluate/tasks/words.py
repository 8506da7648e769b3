"""Tasks that ask for the words that appear most often: plain ones in lists, made-up ones in lines of code words.

Source: RULER (Hsieh et al. 2024), common and frequent words extraction.
"""

import random
from collections.abc import Sequence

from surgeon.runtime.evaluate.tasks.plan import WORD, Fact, Plan, Query
from surgeon.runtime.evaluate.tasks.vocabulary import WORDS, made_up_words

COMMON = "common words"
FREQUENT = "frequent words"
_ASKED = 3
_COMMON_COUNTS = (12,) * _ASKED + (1,) * 24
_FREQUENT_COUNTS = (14, 10, 7, 3, 2, 2, 2, 2)  # falling about as fast as a zeta distribution's


def common_words(drawn: random.Random) -> Plan:
    """Five lists of plain words: three of the words are in many places, the others in one."""
    question = (
        "\n\nQuestion: Which three words appear most often in the lists of words?\n"
        "Answer: The three words that appear most often in the lists are:"
    )
    return _plan(drawn, COMMON, drawn.sample(WORDS, len(_COMMON_COUNTS)), _COMMON_COUNTS, 5, "List of words", question)


def frequent_words(drawn: random.Random) -> Plan:
    """Ten lines of made-up words, of which each is rarer than the one before."""
    question = (
        "\n\nQuestion: Which three coded words appear most often in the text?\n"
        "Answer: The three coded words that appear most often in the text are:"
    )
    words = made_up_words(drawn, len(_FREQUENT_COUNTS))
    return _plan(drawn, FREQUENT, words, _FREQUENT_COUNTS, 10, "Coded words", question)


def _plan(
    drawn: random.Random,
    task: str,
    words: Sequence[str],
    counts: Sequence[int],
    lines: int,
    title: str,
    question: str,
) -> Plan:
    bag = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    drawn.shuffle(bag)
    facts = [Fact(f"\n\n{title}: {', '.join(bag[i::lines])}.\n\n", (i + 0.5) / lines) for i in range(lines)]
    return Plan(tuple(facts), (Query(task, None, question, tuple(words[:_ASKED]), WORD),))
