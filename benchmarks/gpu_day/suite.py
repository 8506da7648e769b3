"""The second stage: the tests that need a GPU, each test function in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpu_day.day import Day, Row, Tell

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "runtime" / "kernels" / "gpu" / "test_on_a_gpu.py"
AT_ONCE = 4
_SLOW = ("test_shapes", "test_dense_rows")
"""Those that compile many packages: they go last."""


def suite(day: Day, _packages: Path, tell: Tell) -> None:
    """Tells the outcome of every test function; an illegal access in one leaves the others alone."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(AT_ONCE) as pool:
        for done in as_completed([pool.submit(outcome, name, Path(cache)) for name in day.tests or functions()]):
            tell(done.result())


def functions() -> list[str]:
    """The names of the test functions, in the order of the file, the slow ones last."""
    found = re.findall(r"^def (test_\w+)", TESTS.read_text("utf-8"), re.MULTILINE)
    return sorted(found, key=_SLOW.__contains__)


def outcome(name: str, cache: Path) -> Row:
    """Runs one test function with all its parameters; compiled parts are kept in `cache` for the other functions."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-o",
            f"cache_dir={cache}",
            f"--junitxml={report}",
        ]
        done = subprocess.run(
            [*command, f"{TESTS}::{name}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        row: Row = {"test": name, "status": done.returncode}
        row |= counted(report) if report.is_file() else {"output": (done.stdout + done.stderr)[-2000:]}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def counted(report: Path) -> Row:
    """The counts of a JUnit report, and the first lines of each failure."""
    (found,) = ElementTree.parse(report).getroot().iter("testsuite")
    failures = {
        str(case.get("name")): str(fault.get("message"))[:400]
        for case in found.iter("testcase")
        for fault in (*case.iter("failure"), *case.iter("error"))
    }
    counts = {name: int(found.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "skipped": counts["skipped"], "failed": len(failures), "failures": failures}
