"""A pilot as a table for people, in the terminal and in the report, and its verdict in words."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.compiler.listing import can_show
from surgeon.runtime.estimates import Estimate
from surgeon.runtime.pilot_results import AgainstDense, Column, Pilot


@dataclass(frozen=True)
class Row:
    """A figure's name with its unit, and its cell in each column."""

    figure: str
    cells: tuple[str, ...]


def pilot_rows(pilot: Pilot) -> tuple[Row, ...]:
    """The table's rows; figures have their standard errors, and a dash stands where there is nothing to say."""

    def row(figure: str, cells: Sequence[str]) -> Row:
        return Row(figure, tuple(cells))

    def beside(figure: str, name: str, pattern: str) -> Row:
        return row(figure, [_beside(column.against_dense, name, pattern) for column in pilot.columns])

    columns = pilot.columns
    return (
        row("visible pairs of blocks", [f"{column.density:.1%}" for column in columns]),
        row("perplexity", [_shown(column.perplexity, "{:.3f}") for column in columns]),
        beside("perplexity, times dense", "perplexity_ratio", "{:.4f}"),
        beside("KL from dense, nats a token", "divergence", "{:.5f}"),
        beside("the same, last quarter", "late_divergence", "{:.5f}"),
        beside("same first token", "agreement", "{:.2%}"),
        row("passkeys found", [_passkeys(column) for column in columns]),
        row("first token, s", [_shown(column.first_token, "{:.3f}") for column in columns]),
        beside("first token, times as fast", "first_token_speedup", "{:.2f}"),
        row("decoding, tokens/s", [_shown(column.decode, "{:.1f}") for column in columns]),
        beside("decoding, times as fast", "decode_speedup", "{:.2f}"),
        row("peak memory, MB", [_megabytes(column.peak_bytes) for column in columns]),
        row("cache kept, MB", [_megabytes(column.kept_cache_bytes) for column in columns]),
        row(
            "weights",
            ["unchanged" if column.weights_sha256 == pilot.weights_sha256 else "CHANGED" for column in columns],
        ),
    )


def verdict(pilot: Pilot) -> tuple[str, ...]:
    """A sentence for every threshold and for the weights, if they changed."""
    sentences = [
        f"{'met' if threshold.met else 'MISSED'}: {threshold.figure} {threshold.found:.4f}, "
        f"to be {threshold.bound} {threshold.limit:g}"
        for threshold in pilot.thresholds
    ]
    if not pilot.weights_unchanged:
        sentences.append("MISSED: the weights are not what they were")
    return tuple(sentences) or ("no threshold was given",)


def pilot_lines(pilot: Pilot, encoding: str) -> tuple[str, ...]:
    """The table and the verdict as lines, in ASCII where `encoding` has no more."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    plain = not can_show(encoding, "─±–")
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, show_edge=False)
    table.add_column(f"{escape(pilot.model)}, {pilot.length:,} tokens")
    for column in pilot.columns:
        table.add_column(escape(column.name), justify="right")
    for row in pilot_rows(pilot):
        table.add_row(row.figure, *row.cells)
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if plain:
        lines = [line.replace("±", "+-").replace("–", "-") for line in lines]
    return (*lines, *verdict(pilot))


def _shown(estimate: Estimate, pattern: str) -> str:
    error = "" if estimate.error is None else f" ± {pattern.format(estimate.error)}"
    return pattern.format(estimate.value) + error


def _beside(beside: AgainstDense | None, name: str, pattern: str) -> str:
    return "–" if beside is None else _shown(getattr(beside, name), pattern)


def _passkeys(column: Column) -> str:
    if column.passkeys_found is None:
        return "–"
    found, tried = (sum(getattr(cell, name) for cell in column.passkeys) for name in ("found", "tried"))
    return f"{found} of {tried}"


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"
