"""The results of a day as Markdown, a table for each stage, and one of the bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_day.bars import bars
from markdown import table

Row = Mapping[str, Any]


def markdown(results: Mapping[str, Any]) -> str:
    """All stages' rows as tables; a column is there if some row has it."""
    parts = [f"# {results['day']}, {results['target']}\n"]
    if not results["rehearsal"]:
        parts.append(f"\n## bars\n\n{bars_table(results['stages'])}")
    for stage, found in results["stages"].items():
        parts.append(f"\n## {stage}: {found['status']}, {found['seconds']} s\n\n{_table(plain_rows(found['rows']))}")
        if "error" in found:
            parts.append(f"\n```\n{found['error'].strip()}\n```\n")
    return "".join(parts)


def bars_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The bars of a day, each with its worst row."""
    judged = [
        (bar.what, f"{'<' if bar.at_most else '>='} {bar.bound:g}", _cell(bar.found), "yes" if bar.met else "no")
        for bar in bars(stages)
    ]
    return table(("bar", "wanted", "worst", "met"), judged)


def plain_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows without the records of launches, which only a repair needs."""
    return [row for row in rows if "launching" not in row and "loading" not in row]


def _table(rows: Sequence[Row]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return table(heads, [[_cell(row.get(name, "")) for name in heads] for row in rows]) if heads else ""


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str("–" if value is None else value)
    return " ".join(text.replace("|", "\\|").split())
