"""vLLM's OpenAI server on this machine: started, asked and stopped by its own protocol, without importing vLLM."""

import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.runtime.errors import ModelError

ADDRESS = "127.0.0.1"
START_SECONDS = 300
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
"""vLLM's environment variables wherever it is measured: nothing fetched or reported, on the threads that OMP counts."""

_USAGE = re.compile(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and the seconds until the first of them and until the last."""

    tokens: tuple[int, ...]
    first: float
    whole: float


@dataclass(frozen=True)
class Server:
    """A running server, which knows its model by the folder's name; its port on this machine, and its process."""

    model: str
    port: int
    process: subprocess.Popen[bytes]

    def ask(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Has a prompt's greedy continuation streamed, and waits for its end."""
        started, times, tokens = time.perf_counter(), [], []
        for found in self.stream(prompt, new_tokens):
            times += [time.perf_counter() - started] * len(found)
            tokens += found
        return Answer(tuple(tokens), times[0], times[-1])

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Generator[list[int], None, None]:
        """The tokens of a prompt's greedy continuation as they come; who closes the generator leaves the server.

        Raises:
            ModelError: the server says that it cannot go on.
        """
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        with self._open("/v1/completions", request) as reply:
            for chunk in chunks_of(reply):
                if error := chunk.get("error"):
                    raise ModelError("vLLM's server", "tokens", str(error), "read its log")
                yield [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]

    def ask_together(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Asks all of the prompts at the same time."""
        answers: dict[int, Answer] = {}

        def ask(index: int) -> None:
            answers[index] = self.ask(prompts[index], new_tokens)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[index] for index in range(len(prompts))]

    def cache_used(self) -> float:
        """The share of the cache's pages that are in use now."""
        with self._open("/metrics") as reply:
            return usage_of(reply.read().decode())

    def cache_used_by(self, prompt: Sequence[int], new_tokens: int) -> float:
        """The share of the cache's pages in use while a prompt is answered, at the last look."""
        looks = [0.0]
        asking = threading.Thread(target=self.ask, args=(prompt, new_tokens))
        asking.start()
        while asking.is_alive():
            looks.append(self.cache_used())
            asking.join(0.2)
        return next((look for look in reversed(looks) if look), 0.0)

    def cpu_seconds(self) -> float:
        """The CPU time that the server's processes have taken so far, in all of their threads."""
        return cpu_seconds_of(self.process.pid)

    def is_up(self) -> bool:
        """True if the server answers."""
        try:
            self._open("/health").close()
        except (OSError, urllib.error.URLError):
            return False
        return True

    def _open(self, path: str, request: Mapping[str, object] | None = None) -> Any:
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://{ADDRESS}:{self.port}{path}", data, headers)
        return urllib.request.urlopen(asked, timeout=START_SECONDS)


def chunks_of(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, up to its end."""
    for line in lines:
        kind, _, data = line.decode().strip().partition(": ")
        if kind == "data" and data != "[DONE]":
            yield json.loads(data)


def usage_of(metrics: str) -> float:
    """The share of the cache's pages in use, from a server's metrics in Prometheus' text format; 0 before any."""
    return sum(map(float, _USAGE.findall(metrics)))


def cpu_seconds_of(number: int) -> float:
    """The CPU time of a process and of all that it has started and that still run, from `/proc`."""
    ticks, parents = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        process = int(status.parent.name)
        parents[process], ticks[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    found, ours = 0, {number}
    while ours:
        found += sum(ticks.get(process, 0) for process in ours)
        ours = {process for process, parent in parents.items() if parent in ours}
    return found / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(
    python: Path, model: Path, options: Mapping[str, object], log: Path, flags: Sequence[str] = (), gigabytes: int = 1
) -> Iterator[Server]:
    """Runs a server of a model's folder in another environment's Python for the duration of a `with` statement.

    `options` are those of `--additional-config`, `flags` more of the server's own; `gigabytes` is the cache's size.

    Raises:
        ModelError: it ends while it starts, or does not start in time; `log` has what it said.
    """
    with socket.create_server((ADDRESS, 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", ADDRESS, "--port", str(port), "--additional-config", json.dumps(options)]
    environment = os.environ | SETTINGS
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_KVCACHE_SPACE": str(gigabytes)}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *flags], env=environment, stdout=output, stderr=subprocess.STDOUT)
        server, deadline = Server(str(model), port, process), time.monotonic() + START_SECONDS
        try:
            while not server.is_up():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ModelError("vLLM's server", "one that starts", "one that does not", f"read {log}")
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait()
