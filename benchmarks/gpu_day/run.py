"""Runs the stages of a day, each in a process of its own with a limit, and writes the results after every one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_day import smoke
from gpu_day.day import DAYS, Row
from gpu_day.report import markdown
from gpu_day.stages import STAGES
from gpu_day.tiles import best_tiles

MAIN = Path(__file__).with_name("__main__.py")
Results = dict[str, Any]


def run(name: str, packages: Path, out: Path, chosen: Sequence[str], go_on: bool = False) -> Results:
    """Runs the chosen stages of a day; after a smoke call that fails, none but if `go_on`.

    In `out` are then results.json, results.md, log.txt and tiles.json with the fastest tiles; after a smoke call that
    failed also its package and what every stage of the compilation made, which is what a repair needs.
    """
    out.mkdir(parents=True, exist_ok=True)
    day = DAYS[name]
    results: Results = {"day": name, "target": day.target, "rehearsal": day.rehearsal, "date": today(), "stages": {}}
    for stage, limit in zip(STAGES, day.limits, strict=True):
        if stage not in chosen:
            continue
        found = run_stage(name, stage, packages, out, limit)
        results["stages"][stage] = found
        if stage == "tiles" and day.target != "cpu" and found["rows"]:
            source = f"gpu_day on {day.target}"
            (out / "tiles.json").write_text(best_tiles(day, found["rows"], source), encoding="utf-8")
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "results.md").write_text(markdown(results), encoding="utf-8")
        print(f"{stage}: {found['status']}, {len(found['rows'])} rows, {found['seconds']} s", flush=True)
        if stage == "smoke" and found["status"] != "done":
            for folder, archive in ((smoke.PACKAGE, "smoke-package"), (smoke.STAGES, smoke.STAGES)):
                shutil.make_archive(str(out / archive), "gztar", packages / folder)
            if not go_on:
                break
    return results


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def run_stage(name: str, stage: str, packages: Path, out: Path, limit: int) -> Results:
    """Runs one stage and returns its rows, as many as there are, with the status "done", "failed" or "cut off"."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("ab") as log:
        log.write(f"\n== {stage} ==\n".encode())
        log.flush()
        rows = Path(scratch) / "rows"
        own = ["--day", name, "--packages", str(packages), "--out", str(out), "--stage", stage, "--rows", str(rows)]
        process = subprocess.Popen([sys.executable, str(MAIN), *own], stdout=log, stderr=log, start_new_session=True)
        try:
            status = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            status = "cut off"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = read_rows(rows)
    result: Results = {"status": status, "seconds": round(time.perf_counter() - started, 1), "rows": found}
    if status == "failed":
        result["exit"] = process.returncode
        result["error"] = (out / "log.txt").read_bytes()[-4000:].decode("utf-8", "replace")
    return result


def tell_rows(stage: str, name: str, packages: Path, rows: Path) -> None:
    """Runs a stage in this process; each row is on disk before the next is measured."""
    with rows.open("w", encoding="utf-8") as file:

        def tell(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(row, flush=True)

        STAGES[stage](DAYS[name], packages, tell)


def read_rows(file: Path) -> list[Row]:
    """The rows that a stage has told; a last one that was cut off is left out."""
    found = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
