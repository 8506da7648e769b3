"""Two workers in processes of their own, each on half of the heads, give the tokens of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import ENVIRONMENT, World, prompts_of

SCRIPT = Path(__file__).with_name("tensor_parallel_process.py")


@pytest.mark.slow
def test_two_workers_share_the_heads(world: World, tmp_path: Path) -> None:
    prompts, file = prompts_of(700, 130, 33), tmp_path / "tokens.json"
    file.write_text(json.dumps(prompts))
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(world.folder), str(world.packages["mixed"]), str(file)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads(file.read_text()) == world.expected(prompts, "mixed")
