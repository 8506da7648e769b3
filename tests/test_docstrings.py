"""The first lines of docstrings: verb or noun phrases that say what a thing is, ended by a period or a colon."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "runtime", "templates")
BANNED = frozenset({"What", "How", "Whether", "Which", "Where", "Those", "Of", "As"})
"""First words that turn a question or a clause into a docstring."""


def python_docstrings(text: str) -> Iterator[tuple[int, str]]:
    """The lines of docstrings and their texts, those of variables included: every string that is a statement."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def template_docstrings(text: str) -> Iterator[tuple[int, str]]:
    """The lines of the docstrings in a template of Python code, and their first lines, as the template has them."""
    for number, line in enumerate(text.split("\n"), 1):
        if found := re.fullmatch(r'\s*"""(\S.*?)(""")?', line):
            yield number, found[1]


def first_lines(folder: str) -> Iterator[tuple[str, str]]:
    """The place and the first line of every docstring below a folder."""
    for file in sorted((ROOT / folder).rglob("*")):
        if file.name.endswith((".py", ".py.jinja")):
            docstrings = python_docstrings if file.suffix == ".py" else template_docstrings
            for line, docstring in docstrings(file.read_text(encoding="utf-8")):
                yield f"{file.relative_to(ROOT)}:{line}", docstring.split("\n", 1)[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    lines = dict(first_lines(folder))
    assert lines, "no docstring was found"
    assert not {place: line for place, line in lines.items() if re.split(r"\W", line, maxsplit=1)[0] in BANNED}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_first_line_of_a_docstring_is_a_whole_sentence(folder: str) -> None:
    assert not {place: line for place, line in first_lines(folder) if not line.endswith((".", ":"))}


def test_a_docstring_is_found_wherever_it_is() -> None:
    module = '"""A module."""\n\nX = 1\n"""A value."""\n\n\ndef f():\n    """A function.\n\n    More.\n    """\n'
    assert {docstring.split("\n")[0] for _, docstring in python_docstrings(module)} == {
        "A module.",
        "A value.",
        "A function.",
    }
    assert [first for _, first in template_docstrings(module)] == ["A module.", "A value.", "A function."]
