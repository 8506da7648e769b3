"""A pilot as a table for people, in the terminal and in the report, and its verdict in words."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from surgeon.compiler.system.terminal import can_show
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.figures import FIGURES, RelativeFigure
from surgeon.runtime.evaluate.pilot_file import Column, Pilot


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
    rows = [Row(figure.name, tuple(figure.cell(column) for column in pilot.columns)) for figure in _FIGURES]
    weights = ["unchanged" if column.weights_sha256 == pilot.weights_sha256 else "CHANGED" for column in pilot.columns]
    heads = tuple(column.name for column in pilot.columns)
    return Table(heads, (*rows, Row("weights", tuple(weights))))


def density_table(pilots: Sequence[Pilot]) -> Table:
    """The table of several pilots: one row per model, by falling density, relative to the first pilot's dense model."""
    columns = [pilots[0].columns[0], *(column for pilot in pilots for column in pilot.columns[1:])]
    columns.sort(key=lambda column: -column.density)
    figures = [figure for figure in _FIGURES if figure.by_density]
    rows = [Row(column.name, tuple(figure.cell(column) for figure in figures)) for column in columns]
    return Table(tuple(figure.name for figure in figures), tuple(rows))


def passkeys(column: Column) -> str:
    """The count of hidden numbers that a model found, for example "2 of 4"; a dash if none was hidden."""
    if column.passkeys_found is None:
        return "–"
    found, tried = (sum(getattr(cell, name) for cell in column.passkeys) for name in ("found", "tried"))
    return f"{found} of {tried}"


def verdict(pilot: Pilot) -> tuple[str, ...]:
    """One sentence for every threshold, and one for the weights if they changed."""
    sentences = [
        f"{'met' if threshold.met else 'MISSED'}: {threshold.figure} {threshold.found:.4f}, "
        f"to be {threshold.bound} {threshold.limit:g}"
        for threshold in pilot.thresholds
    ]
    if not pilot.weights_unchanged:
        sentences.append("MISSED: the weights are not what they were")
    return tuple(sentences) or ("no threshold was given",)


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
    Console(file=text, width=120, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if plain:
        lines = [line.replace("±", "+-").replace("–", "-") for line in lines]
    return (*lines, *verdict(pilot))


def _shown(estimate: Estimate, pattern: str) -> str:
    error = "" if estimate.error is None else f" ± {pattern.format(estimate.error)}"
    return pattern.format(estimate.value) + error


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"


@dataclass(frozen=True)
class _Figure:
    """A figure with its unit, its cell for a model, and whether the table of several pilots includes it."""

    name: str
    cell: Callable[[Column], str]
    by_density: bool = True


_OWN = {
    "density": _Figure("visible pairs of blocks", lambda column: f"{column.density:.1%}"),
    "perplexity": _Figure("perplexity", lambda column: _shown(column.perplexity, "{:.3f}"), by_density=False),
    "passkeys_found": _Figure("passkeys found", passkeys),
    "first_token": _Figure("first token, s", lambda column: _shown(column.first_token, "{:.3f}"), by_density=False),
    "decode": _Figure("decoding, tokens/s", lambda column: _shown(column.decode, "{:.1f}"), by_density=False),
    "peak_bytes": _Figure("peak memory, MB", lambda column: _megabytes(column.peak_bytes), by_density=False),
    "kept_cache_bytes": _Figure("cache kept, MB", lambda column: _megabytes(column.kept_cache_bytes)),
}
"""The figures of a model on its own, by their fields in `Column`."""


def _relative(field: str, figure: RelativeFigure) -> _Figure:
    def cell(column: Column) -> str:
        estimate = column.beside_dense(field)
        return "–" if estimate is None else _shown(estimate, figure.pattern)

    return _Figure(figure.name, cell, figure.by_density)


def _ordered() -> Iterator[_Figure]:
    for own, figure in _OWN.items():
        yield figure
        yield from (_relative(field, relative) for field, relative in FIGURES.items() if relative.follows == own)


_FIGURES = tuple(_ordered())
