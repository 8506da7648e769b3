"""The days that are kept, as Markdown for the README pages; without any, what these pages say instead."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_day import kept
from gpu_day.report import bars_table
from markdown import table

Day = Mapping[str, Any]

NOWHERE = "- It has not run on a GPU yet. Kernels for GPUs are compiled and tested without one.\n"
"""The front page's item while no day is kept."""

NOTHING = """\
None of the kernels for GPUs has run on one yet: no test marked `gpu`, no tile or variant of
`tiles.json`, no stage below. They are compiled, read in the disassembly, run by Triton's interpreter,
and launched on a stand-in driver, which computes nothing.
"""
"""The same on the page of benchmarks."""


def where_it_ran() -> str:
    """The front page's item about GPUs."""
    ran = [f"{kept.machine(day)['card']} ({day['date']})" for day in kept.days()]
    if not ran:
        return NOWHERE
    return f"- On a GPU it has run for some minutes only: {', '.join(ran)}. All other targets are untried.\n"


def first_rows() -> str:
    """The front page's table: prefills and decoding at the most important length, one sequence."""
    found = map(_first, kept.days())
    return "".join(f"\n{table(head, rows)}" for head, rows in found if rows)  # a day cut off before has none


def all_rows() -> str:
    """The page of benchmarks: for each day its stages, its bars and its rows, or that there is none."""
    return "\n".join(map(_day, kept.days())) or NOTHING


def _first(day: Day) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows = [row for row in _speed(day) if row["batch"] == 1]
    chosen = [row for row in rows if row["length"] == rows[0]["length"]]
    head = (f"{kept.machine(day)['card']}, bf16, {day['date']}", "SDPA", "FlexAttention", "Surgeon")
    return head, [(_what(row), *(_time(row, name) for name in ("sdpa", "flex", "ours"))) for row in chosen]


def _day(day: Day) -> str:
    machine = kept.machine(day)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "cuda", "triton", "python"))
    stages = [(name, found["status"], f"{found['seconds']} s", _told(found)) for name, found in day["stages"].items()]
    names = ("sdpa", "cudnn", "flex", "ours")
    speeds = [(_what(row), str(row["batch"]), *(_time(row, name) for name in names)) for row in _speed(day)]
    models = [
        (row["what"], f"{row['length']:,}", f"{row['dense_ms']:.1f} ms", f"{row['patched_ms']:.1f} ms")
        for row in day["stages"].get("model", {"rows": []})["rows"]
    ]
    parts = (
        (("stage", "ended", "took", "found"), stages),
        (("call", "batch", "SDPA", "cuDNN", "FlexAttention", "Surgeon"), speeds),
        (("four random layers", "tokens", "dense", "patched"), models),
    )
    head = f"**{machine['card']}**, {day['target']}, {versions}, {day['date']}.\n"
    tables = [bars_table(day["stages"]), *(table(names, rows) for names, rows in parts if rows)]
    return "\n".join([head, *tables])


def _told(stage: Day) -> str:
    """The counts of a stage that has tests or faults, else its rows."""
    rows = stage["rows"]
    tested = [row for row in rows if "passed" in row]
    if tested:
        counts = (f"{sum(row[name] for row in tested)} {name}" for name in ("passed", "failed", "skipped"))
        return ", ".join(counts)
    faults = sum("fault" in row for row in rows)
    return f"{len(rows)} rows" + (f", {faults} faults" if faults else "")


def _speed(day: Day) -> list[Day]:
    rows: list[Day] = day["stages"].get("speed", {"rows": []})["rows"]
    return rows


def _what(row: Day) -> str:
    noun = "prefill of" if row["phase"] == "prefill" else "a token decoded after"
    return f"{noun} {row['length']:,}, {row['density']:.0%} of the blocks"


def _time(row: Day, name: str) -> str:
    return f"{row[f'{name}_ms']:.3g} ms" if f"{name}_ms" in row else "–"
