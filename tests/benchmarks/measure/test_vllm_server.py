"""The client of vLLM's server: what it reads of streams and metrics, and a server that does not start."""

import subprocess
import sys
from pathlib import Path

import pytest

from measure.vllm_server import chunks_of, cpu_seconds_of, served, usage_of
from surgeon.runtime.errors import ModelError


def test_a_stream_is_read_up_to_its_end() -> None:
    lines = [b'data: {"choices": [{"token_ids": [1]}]}\n', b"\n", b": a comment\n", b'data: {"choices": []}\n']
    assert list(chunks_of(iter([*lines, b"data: [DONE]\n"]))) == [{"choices": [{"token_ids": [1]}]}, {"choices": []}]


def test_the_share_of_the_cache_in_use() -> None:
    metrics = (
        "# TYPE vllm:kv_cache_usage_perc gauge\n"
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
        'vllm:num_requests_running{engine="0",model_name="m"} 1.0\n'
    )
    assert usage_of(metrics) == 0.25
    assert usage_of("") == 0.0


WORK = """
import subprocess, sys, time
while time.process_time() < float(sys.argv[1]):
    pass
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[3:]]) if sys.argv[3:] else None
print("done", flush=True)
sys.stdin.read()
if child:
    child.wait()
"""


def test_the_cpu_time_of_processes_and_their_own() -> None:
    command = [sys.executable, "-c", WORK, "0.3", WORK, "0.4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == [b"done\n"] * 2
        assert 0.68 <= cpu_seconds_of(process.pid) < 2
        process.stdin.close()


def test_a_server_that_ends_at_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(ModelError, match="expected one that starts, got one that does not; read"),
        served(Path(sys.executable), tmp_path, {}, log),
    ):
        pass
    assert "vllm" in log.read_text(), "this environment has none"
