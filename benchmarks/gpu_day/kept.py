"""A day's results as they are kept in the repository: `results/gpu-<card>.json`, made from the day's own file."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_day.report import plain_rows

RESULTS = Path(__file__).parents[1] / "results"


def keep(out: Path, results: Path = RESULTS) -> Path:
    """Turns `out`/results.json into the file of its card, in place of an earlier day's, and returns its path.

    What only a repair needs, the record of each launch, is left out.

    Raises:
        SystemExit: there are no results of a card: the day was a rehearsal, or its smoke call failed.
    """
    day = read(out / "results.json")
    stages = {
        name: {"status": found["status"], "seconds": found["seconds"], "rows": plain_rows(found["rows"])}
        for name, found in day["stages"].items()
    }
    file = results / f"gpu-{_slug(machine(day)['card'])}.json"
    file.write_text(json.dumps(dict(day) | {"stages": stages}, indent=1) + "\n", encoding="utf-8")
    return file


def days(results: Path = RESULTS) -> Iterator[Mapping[str, Any]]:
    """Yields the days that are kept, by card.

    Raises:
        SystemExit: a file is not a card's.
    """
    return (read(file) for file in sorted(results.glob("gpu-*.json")))


def read(file: Path) -> Mapping[str, Any]:
    """Reads the results of a day on a card.

    Raises:
        SystemExit: there is no such file, or it has no results of a card.
    """
    if not file.is_file():
        raise SystemExit(f"{file}: expected the results of a day, got no file; name the day's folder with --out")
    day: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if day["rehearsal"]:
        raise SystemExit(f"{file}: expected a day on a card, got a rehearsal; its figures say nothing about a card")
    smoke = day["stages"].get("smoke", {"status": "not run"})
    if smoke["status"] != "done":
        raise SystemExit(f"{file}: expected a smoke call that is done, got {smoke['status']}; there are no figures")
    return day


def machine(day: Mapping[str, Any]) -> Mapping[str, Any]:
    """The card and the versions that a day's figures belong to: the first row of its smoke call."""
    row: Mapping[str, Any] = day["stages"]["smoke"]["rows"][0]
    return row


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
