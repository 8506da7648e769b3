"""A pilot as a table for people, in the terminal and in the report, and its verdict in words."""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from surgeon.compiler.system.terminal import can_show
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot.figures import FIGURES, RelativeFigure
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot
from surgeon.runtime.evaluate.retrieval import KEPT, task_names


@dataclass(frozen=True)
class Row:
    """A row's name, for example a figure with its unit, and its cell in each column."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The column headings, and the rows."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def pilot_table(pilot: Pilot) -> Table:
    """The table of a pilot: one row per figure, one column per model.

    Figures have their standard errors; a dash marks a missing value.
    """
    rows = [
        Row(figure.name, tuple(figure.cell(pilot, column) for column in pilot.columns)) for figure in _figures(pilot)
    ]
    weights = ["unchanged" if column.weights_sha256 == pilot.weights_sha256 else "CHANGED" for column in pilot.columns]
    heads = tuple(_head(column) for column in pilot.columns)
    return Table(heads, (*rows, Row("weights", tuple(weights))))


def density_table(pilots: Sequence[Pilot]) -> Table:
    """The table of several pilots: one row per model, by falling density, relative to the first pilot's dense model."""
    columns = [(pilots[0], pilots[0].columns[0])]
    columns += [(pilot, column) for pilot in pilots for column in pilot.columns[1:]]
    columns.sort(key=lambda each: -each[1].density)
    figures = [figure for figure in _figures(pilots[0]) if figure.by_density]
    rows = [Row(_head(column), tuple(figure.cell(pilot, column) for figure in figures)) for pilot, column in columns]
    return Table(tuple(figure.name for figure in figures), tuple(rows))


def retrieval_table(pilot: Pilot) -> Table:
    """Mean scores of every model by task, by prompt length, and by where the question stands."""
    rows = []
    for task in task_names(pilot.questions):
        own = [question for question in pilot.questions if question.task == task]
        for length in sorted({question.length for question in own}):
            for asked in sorted({question.asked for question in own if question.length == length}):
                found = [pilot.score(column, task, length, asked) for column in pilot.columns]
                rows.append(Row(f"{task}, {length:,} tokens, {_ASKED[asked]}", tuple(map(_percent, found))))
    return Table(tuple(_head(column) for column in pilot.columns), tuple(rows))


def verdict(pilot: Pilot) -> tuple[str, ...]:
    """One sentence for every threshold, one for the weights if they changed, and one for what was not judged."""
    sentences = [
        f"{'met' if threshold.met else 'MISSED'}: {threshold.figure} {threshold.found:.4f}, "
        f"to be {threshold.bound} {threshold.limit:g}"
        for threshold in pilot.thresholds
    ]
    if not pilot.weights_unchanged:
        sentences.append("MISSED: the weights are not what they were")
    if not sentences:
        sentences.append("no threshold was given")
    if pilot.dropped_tasks:
        tasks = ", ".join(f"{each.task} ({each.score:.0%} of {each.questions})" for each in pilot.dropped_tasks)
        sentences.append(f"dropped, since the dense model scores less than {KEPT:.0%}: {tasks}")
    if not pilot.questions:
        sentences.append("retrieval was not judged: there is no task that the dense model can do")
    return tuple(sentences)


def refusal(pilot: Pilot) -> str | None:
    """The reason to refuse the package, on one line; None if the pilot passed."""
    missed = [
        f"{each.figure} {each.found:.4g} instead of {each.bound} {each.limit:g}"
        for each in pilot.thresholds
        if not each.met
    ]
    if not pilot.weights_unchanged:
        missed.append("the weights have changed")
    return f"refused: {'; '.join(missed)}" if missed else None


def pilot_lines(pilot: Pilot, encoding: str) -> tuple[str, ...]:
    """Formats the table and the verdict as lines, in ASCII if `encoding` has nothing more."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    plain = not can_show(encoding, "─±–")
    table = Grid(box=box.ASCII2 if plain else box.SIMPLE_HEAD, show_edge=False)
    table.add_column(f"{escape(pilot.model)}, {pilot.length:,} tokens")
    found = pilot_table(pilot)
    for head in found.heads:
        table.add_column(escape(head), justify="right")
    for row in found.rows:
        table.add_row(row.name, *row.cells)
    text = io.StringIO()
    Console(file=text, width=140, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if plain:
        lines = [line.replace("±", "+-").replace("–", "-") for line in lines]
    return (*lines, *verdict(pilot))


def _shown(estimate: Estimate, pattern: str) -> str:
    error = "" if estimate.error is None else f" ± {pattern.format(estimate.error)}"
    return pattern.format(estimate.value) + error


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"


def _percent(estimate: Estimate | None) -> str:
    return "–" if estimate is None else _shown(estimate, "{:.0%}")


def _head(column: Column) -> str:
    return column.name if column.recall in (None, column.name) else f"{column.name}, recall {column.recall}"


@dataclass(frozen=True)
class _Figure:
    """A figure with its unit, its cell for a model of a pilot, and whether the table of several pilots includes it."""

    name: str
    cell: Callable[[Pilot, Column], str]
    by_density: bool = True


def _continuation(_pilot: Pilot, column: Column) -> str:
    found = column.continuation_perplexity
    return "–" if found is None else _shown(found, "{:.3f}")


_ASKED = {"end": "asked at the end", "later": "asked later"}
_OWN = {
    "density": _Figure("visible pairs of blocks", lambda _, column: f"{column.density:.1%}"),
    "continuation_perplexity": _Figure("continuation: perplexity", _continuation, by_density=False),
    "scores": None,  # a figure for each task
    "perplexity": _Figure("prompt: perplexity", lambda _, column: _shown(column.perplexity, "{:.3f}"), False),
    "first_token": _Figure("first token, s", lambda _, column: _shown(column.first_token, "{:.3f}"), False),
    "decode": _Figure("decoding, tokens/s", lambda _, column: _shown(column.decode, "{:.1f}"), False),
    "peak_bytes": _Figure("peak memory, MB", lambda _, column: _megabytes(column.peak_bytes), False),
    "kept_cache_bytes": _Figure("cache kept, MB", lambda _, column: _megabytes(column.kept_cache_bytes)),
}
"""The figures of a model on its own, by their fields in `Column`."""


def _relative(field: str, figure: RelativeFigure) -> _Figure:
    def cell(_pilot: Pilot, column: Column) -> str:
        estimate = column.beside_dense(field)
        shown = "–" if estimate is None else _shown(estimate, figure.pattern)
        named = field == "worst_retrieval" and column.against_dense is not None and column.against_dense.worst_task
        return f"{shown} ({named})" if named else shown

    return _Figure(figure.name, cell, figure.by_density)


def _task(task: str, questions: int) -> _Figure:
    return _Figure(
        f"retrieval: {task}, of {questions}", lambda pilot, column: _percent(pilot.score(column, task)), False
    )


def _figures(pilot: Pilot) -> Iterator[_Figure]:
    for own, figure in _OWN.items():
        if figure is not None:
            yield figure
        else:
            counts = Counter(question.task for question in pilot.questions)
            yield from (_task(task, count) for task, count in counts.items())
        yield from (_relative(field, relative) for field, relative in FIGURES.items() if relative.follows == own)
