"""Runs a script in several processes that talk through torch.distributed, as torchrun starts them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PATIENCE = 600
"""Seconds after which processes that wait for one another are given up, of half a minute that they take."""


def torchrun(script: Path, *arguments: str | Path, processes: int = 2, fails: bool = False) -> str:
    """Runs a script of the tests on each of so many processes, which may import what tests import.

    Returns what all of them and torchrun said, once they have ended as they should.
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
        started.send_signal(signal.SIGTERM)  # it ends those that it started, which SIGKILL would leave running
        output, _ = started.communicate()
        raise AssertionError(f"{script.name} waits for ever; so far it said:\n{output[-8000:]}") from None
    assert (started.returncode != 0) == fails, output[-8000:]
    return output
