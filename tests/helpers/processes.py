"""Runs a script in several processes that communicate through torch.distributed, started by torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
PATIENCE = 600
"""Seconds after which processes that wait for each other are given up; they normally take half a minute."""


def torchrun(script: Path, *arguments: str | Path, processes: int = 2, fails: bool = False) -> str:
    """Runs a test script in each of this many processes, which may import whatever tests import.

    Returns the output of all of them and torchrun, once they have ended successfully.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
    environment = os.environ | {"PYTHONPATH": str(TESTS / "helpers"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=environment,
        cwd=TESTS / "helpers",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGTERM)  # torchrun then ends its processes, which SIGKILL would leave running
        output, _ = started.communicate()
        raise AssertionError(f"{script.name} waits for ever; so far it said:\n{output[-8000:]}") from None
    assert (started.returncode != 0) == fails, output[-8000:]
    return output


def ended(number: int) -> None:
    """Waits until a process that was killed, and is no child of this one, runs no more."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{number}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if status.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {number} still runs")


def descendants(number: int) -> dict[int, str]:
    """The processes that a process has started, and those that they have, with what each is called."""
    started: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        started.setdefault(parent, []).append(int(status.parent.name))
    found: dict[int, str] = {}
    open_ = list(started.get(number, ()))
    while open_:
        child = open_.pop()
        found[child] = _title(child)
        open_ += started.get(child, ())
    return found


def _title(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ignored_signals() -> set[int]:
    """The signals that this process ignores, as the kernel has them: Python does not see what a library sets."""
    fields = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    mask = int(fields["SigIgn"], 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}
