"""Tables of Markdown, and lists in its sentences."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table from its cells, the head first."""
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return "".join([first, "|" + "---|" * len(head) + "\n", *others])


def listed(words: Sequence[str]) -> str:
    """Two words or more, as a sentence lists them."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
