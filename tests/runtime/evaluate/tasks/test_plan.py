"""The score of an answer: exact items, as many as were asked for."""

import pytest

from surgeon.runtime.evaluate.tasks.plan import WORD, Query

ONE = Query("one", 0.5, "The number is", ("12345",))
PAIR = Query("pair", None, "The numbers are", ("12345", "67890"))
WORDS = Query("words", None, "The words are:", ("apple", "bell", "coin"), WORD)


@pytest.mark.parametrize(
    ("query", "answer", "score"),
    [
        (ONE, " 12345.\n\n", 1),
        (ONE, " number 12345", 1),
        (ONE, " 1234", 0),
        (ONE, " 123456", 0),
        (ONE, " 1 12345", 0),
        (ONE, "", 0),
        (PAIR, " 67890 and 12345, respectively", 1),
        (PAIR, " 12345 and 12345 and 67890", 0.5),
        (PAIR, " 11111, 12345, 67890", 0.5),
        (WORDS, " bell, coin, and apple.", 1),
        (WORDS, " apple bell bells", 2 / 3),
    ],
)
def test_an_item_counts_if_it_is_exact_and_among_the_first(query: Query, answer: str, score: float) -> None:
    assert query.score(answer) == score


@pytest.mark.parametrize(
    ("answer", "scored"), [("", False), (" 1234", False), (" 12345", False), (" 12345.", True), (" 1 2", True)]
)
def test_an_answer_is_scored_once_its_last_item_has_ended(answer: str, scored: bool) -> None:
    assert ONE.is_scored(answer) is scored
