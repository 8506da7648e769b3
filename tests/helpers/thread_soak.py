"""Many threads on one patched model and its package, each call compared with the same call on a single thread."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicCache

from models import padded, tiny_llama, tokens
from surgeon.runtime import Package, SurgeonCache, patch

THREADS = 8
Call = Callable[[], torch.Tensor]
_NEW_TOKENS = 20


@dataclass
class ThreadsFound:
    """Counts of calls and of rounds of fresh threads; the process's memory in MiB after each round."""

    calls: int = 0
    rounds: int = 0
    memory: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """The memory at the end over that after the first fifth of the rounds, at least one."""
        settled = self.memory[len(self.memory) // 5 :]
        return settled[-1] / settled[0] - 1


def mixed_calls(package: Package) -> dict[str, Call]:
    """Calls by name: generation with each kind of cache and several lengths, and attention of single layers."""
    model, recalling = tiny_llama(), tiny_llama()
    patch(model, package, recall="pattern")  # under which a cache drops blocks
    patch(recalling, package, recall="dense", dense_rows=20)
    caches: dict[str, Callable[[], dict[str, Any]]] = {
        "dynamic": lambda: {"past_key_values": DynamicCache()},
        "static": lambda: {"past_key_values": StaticCache(model.config, max_cache_len=160)},
        "surgeon": lambda: {"past_key_values": SurgeonCache(package)},
        "no": lambda: {"use_cache": False},
        "chunked": lambda: {"past_key_values": DynamicCache(), "prefill_chunk_size": 16},
    }
    calls: dict[str, Call] = {}
    for name, cache in caches.items():
        for length in (3, 40, 97):
            ids = tokens(1, length, seed=length)
            calls[f"{name} cache, {length} tokens"] = partial(_generated, model, ids, torch.ones_like(ids), cache)
        calls[f"{name} cache, padded"] = partial(_generated, model, *padded((50, 33, 3)), cache)
        calls[f"{name} cache, recall"] = partial(_generated, recalling, tokens(1, 90), torch.ones(1, 90).long(), cache)
    for layer, (queries, keys) in enumerate(((1, 130), (17, 64), (90, 90))):
        generator = torch.Generator().manual_seed(layer)
        q = torch.randn(2, 4, queries, 32, generator=generator)
        k, v = torch.randn(2, 2, 2, keys, 32, generator=generator)
        calls[f"attention, {queries} queries"] = partial(package.attention, layer, q, k, v)
        calls[f"log-sum-exp, {queries} queries"] = lambda layer=layer, q=q, k=k, v=v: package.attention_with_lse(  # type: ignore[misc]
            layer, q, k, v
        )[1]
    return calls


def _generated(
    model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, cache: Callable[[], dict[str, Any]]
) -> torch.Tensor:
    output = model.generate(ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, **cache())
    assert isinstance(output, torch.Tensor)
    return output


def call_from_threads(calls: dict[str, Call], seconds: float, report: Callable[[str], object] = print) -> ThreadsFound:
    """Makes the calls from fresh threads, round after round, each thread in an order of its own."""
    with torch.no_grad():
        expected = {name: call() for name, call in calls.items()}
    found, end = ThreadsFound(), time.monotonic() + seconds
    lock = threading.Lock()

    def work(seed: int) -> None:
        names = list(calls)
        random.Random(seed).shuffle(names)
        for name in names:
            try:
                with torch.no_grad():
                    same = torch.equal(calls[name](), expected[name])
                fault = None if same else f"{name}: other values than on a single thread"
            except Exception as error:
                fault = f"{name}: {type(error).__name__}: {error}"
            with lock:
                found.calls += 1
                if fault is not None:
                    found.faults.append(fault)

    while not found.rounds or time.monotonic() < end:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS * found.rounds, THREADS * (found.rounds + 1))))
        found.rounds += 1
        found.memory.append(resident())
        report(f"round {found.rounds}: {found.calls} calls, {len(found.faults)} faults, {found.memory[-1]:.0f} MiB")
    return found


def resident() -> float:
    """The memory that this process holds, in MiB."""
    return next(_fields("VmRSS")) / 1024


def _fields(name: str) -> Iterator[int]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            yield int(line.split()[1])
