"""Two workers in processes of their own, each on half of the heads: their tokens, and their end if one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import ENVIRONMENT, World, prompts_of
from processes import PATIENCE, descendants, ended

SCRIPT = Path(__file__).with_name("tensor_parallel_process.py")


@pytest.mark.slow
def test_two_workers_share_the_heads_until_one_is_killed(world: World, tmp_path: Path) -> None:
    prompts, package = prompts_of(700, 130, 33), world.packages["mixed"]
    asked, answers, log = (tmp_path / name for name in ("prompts.json", "tokens.json", "log"))
    asked.write_text(json.dumps(prompts))
    before = {file: file.read_bytes() for file in package.rglob("*") if file.is_file()}
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(world.folder), str(package), str(asked), str(answers)]
    with log.open("w") as output:
        engine = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    processes: dict[int, str] = {}
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers.is_file():
            assert engine.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(0.1)
        assert json.loads(answers.read_text()) == world.expected(prompts, "mixed")
        processes = descendants(engine.pid)
        (worker,) = [number for number, title in processes.items() if "Worker_TP1" in title]
        os.kill(worker, signal.SIGKILL)
        assert engine.wait(PATIENCE) == 1, "an error, not tokens of half of the heads"
        for number in processes:
            ended(number)
    finally:
        for number in (engine.pid, *processes):
            _kill(number)
        engine.wait()
    assert "EngineDeadError" in log.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "prompts.json", "tokens.json"]
    assert {file: file.read_bytes() for file in package.rglob("*") if file.is_file()} == before


def _kill(number: int) -> None:
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return
