"""The OpenAI server on a package: what its clients get, one that leaves, and the death of its engine."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import LONGEST, World, prompts_of
from measure.vllm_server import Server, served
from processes import PATIENCE, descendants, ended
from surgeon.runtime.errors import ModelError

FLAGS = ("--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", str(LONGEST), "--block-size", "64")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {"surgeon_package": str(world.packages["mixed"])}
    log = tmp_path_factory.mktemp("server") / "log"
    with served(Path(sys.executable), world.folder, options, log, (*FLAGS, "--enforce-eager")) as running:
        yield running


def until_the_cache_is_free(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.cache_used():
        assert time.monotonic() < deadline, "the pages of a client that has left are never freed"
        time.sleep(0.05)


def test_clients_that_ask_together(world: World, server: Server) -> None:
    prompts = prompts_of(700, 130, 33, 512)
    answers = [list(answer.tokens) for answer in server.ask_together(prompts, 20)]
    assert answers == world.expected(prompts, "mixed", new_tokens=20)


def test_a_client_that_leaves(world: World, server: Server) -> None:
    prompts = prompts_of(300, 200)
    leaving = server.stream(prompts[0], 700)
    assert any(next(leaving) for _ in range(3))
    assert server.cache_used() > 0
    leaving.close()
    answer = list(server.ask(prompts[1], 20).tokens)
    until_the_cache_is_free(server)
    assert [answer, list(server.ask(prompts[0], 20).tokens)] == world.expected(prompts[::-1], "mixed", new_tokens=20)


def test_an_engine_that_is_killed_ends_the_server(server: Server) -> None:  # the last one: it needs a server that runs
    processes = descendants(server.process.pid)
    (engine,) = [number for number, title in processes.items() if "EngineCore" in title]
    answer = server.stream(prompts_of(300)[0], 700)
    next(answer)
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(ModelError, match=r"vLLM's server: expected tokens, got .*EngineCore"):
        list(answer)
    server.process.wait(PATIENCE)  # with status 0, as vLLM 0.32 has it
    for number in processes:
        ended(number)
