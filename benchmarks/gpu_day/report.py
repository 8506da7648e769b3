"""The results of a day as Markdown, a table for each stage."""

from collections.abc import Iterable, Mapping
from typing import Any


def markdown(results: Mapping[str, Any]) -> str:
    """All stages' rows as tables; a column is there if some row has it."""
    parts = [f"# {results['day']}, {results['target']}\n"]
    for stage, found in results["stages"].items():
        parts.append(f"\n## {stage}: {found['status']}, {found['seconds']} s\n\n")
        plain = [row for row in found["rows"] if "launching" not in row and "loading" not in row]
        parts += _table(plain)
        if "error" in found:
            parts.append(f"\n```\n{found['error'].strip()}\n```\n")
    return "".join(parts)


def _table(rows: list[Mapping[str, Any]]) -> Iterable[str]:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    if heads:
        yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name, '')) for name in heads)} |\n"


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
