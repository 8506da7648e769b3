"""The client of vLLM's server: what it reads of streams and metrics, and a server that does not start."""

import sys
from pathlib import Path

import pytest

from measure.vllm_server import chunks_of, served, usage_of
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


def test_a_server_that_ends_at_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(ModelError, match="expected one that starts, got one that does not; read"),
        served(Path(sys.executable), tmp_path, {}, log),
    ):
        pass
    assert "vllm" in log.read_text(), "this environment has none"
