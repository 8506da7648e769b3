"""A plan of tasks in words: facts to hide, and questions about them. Nothing here knows tokens."""

import re
from dataclasses import dataclass

NUMBER = re.compile(r"\d+")
WORD = re.compile(r"\b(?!and\b)[A-Za-z]+")


@dataclass(frozen=True)
class Fact:
    """A text to hide, and the share of the filler before it."""

    text: str
    depth: float


@dataclass(frozen=True)
class Query:
    """A question that the answer completes, and the items that it is to name, in any order.

    `item` matches one item in an answer. `depth` is that of the fact that is asked for, None if there are several.
    """

    task: str
    depth: float | None
    text: str
    expected: tuple[str, ...]
    item: re.Pattern[str] = NUMBER

    def score(self, answer: str) -> float:
        """The share of the expected items among the answer's first items, as many as are expected.

        An answer that lists all it remembers therefore gains nothing.
        """
        named = self.item.findall(answer)[: len(self.expected)]
        return len(set(named) & set(self.expected)) / len(self.expected)

    def is_scored(self, answer: str) -> bool:
        """True if no continuation of the answer can change its score."""
        ends = [match.end() for match in self.item.finditer(answer)]
        wanted = len(self.expected)
        return len(ends) > wanted or (len(ends) == wanted and ends[-1] < len(answer))


@dataclass(frozen=True)
class Plan:
    """The facts that are hidden in one text, and the queries about them."""

    facts: tuple[Fact, ...]
    queries: tuple[Query, ...]
