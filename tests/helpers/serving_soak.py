"""Requests of random lengths that come, go and leave in one engine of vLLM, each compared with its own single run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engines import LONGEST, Engine, World, prompts_of
from models import VOCABULARY

RECALLS = ("dense", "pattern")
SETTINGS = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 256,  # so prompts come in chunks
    "max_num_seqs": 12,
}
PAGES = {"dense": 29, "pattern": 66}
"""The pages of the cache, few enough that requests are preempted; under "pattern" each layer has a table of its own."""

_PREFIXES = 2
_LONGEST_ANSWER = 60


@dataclass(frozen=True)
class Request:
    """A prompt, the tokens that are to follow, and after how many steps its client leaves: None if it stays."""

    prompt: list[int]
    new_tokens: int
    leaves_after: int | None


@dataclass
class ServingFound:
    """Counts of requests served, of those whose client left, and of what the engine did; the faults found."""

    requests: int = 0
    left: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    faults: list[str] = field(default_factory=list)


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """So many requests; half begin with a part of one of a few prefixes, and the client of one in five leaves."""
    draw = random.Random(seed)
    prefixes = prompts_of(*(LONGEST - _LONGEST_ANSWER - number for number in range(_PREFIXES)))
    made = []
    for _ in range(count):
        length, new_tokens = draw.randint(1, LONGEST - _LONGEST_ANSWER), draw.randint(1, _LONGEST_ANSWER)
        shared = draw.randint(0, length) if draw.random() < 0.5 else 0
        own = [draw.randrange(1, VOCABULARY) for _ in range(length - shared)]
        leaves_after = draw.randrange(_LONGEST_ANSWER) if draw.random() < 0.2 else None
        made.append(Request([*draw.choice(prefixes)[:shared], *own], new_tokens, leaves_after))
    return made


def serve_mixed(world: World, engine: Engine, requests: Sequence[Request], recall: str, seed: int = 0) -> ServingFound:
    """Serves the requests, which arrive at random steps, and compares each answer with the patched Transformers model.

    An answer whose client has left must be the beginning of the expected one, and in the end every page must be free.
    """
    free, found = engine.free_pages, ServingFound()
    answers = _serve(engine, requests, random.Random(seed), found)
    for number, request in enumerate(requests):
        (expected,) = world.expected([request.prompt], "mixed", recall, request.new_tokens)
        answer = answers[number]
        found.requests += 1
        if answer != (expected if request.leaves_after is None else expected[: len(answer)]):
            found.faults.append(f"request {number}, {len(request.prompt)} tokens: expected {expected}, got {answer}")
    found.preemptions = engine.count("vllm:num_preemptions")
    if (now := engine.free_pages) != free:
        found.faults.append(f"{now} pages are free after all requests, {free} were before")
    return found


def _serve(engine: Engine, requests: Sequence[Request], draw: random.Random, found: ServingFound) -> list[list[int]]:
    """The tokens of each request, as far as its client was there."""
    from vllm import SamplingParams

    core: Any = engine.llm.llm_engine
    answers: list[list[int]] = [[] for _ in requests]
    leaving: dict[str, int] = {}
    arriving, step = list(enumerate(requests))[::-1], 0
    while arriving or core.has_unfinished_requests():
        for _ in range(min(len(arriving), draw.randrange(4))):
            number, request = arriving.pop()
            settings = SamplingParams(temperature=0, max_tokens=request.new_tokens, detokenize=False, ignore_eos=True)
            core.add_request(str(number), {"prompt_token_ids": request.prompt}, settings)
            if request.leaves_after is not None:
                leaving[str(number)] = step + request.leaves_after
        now = [name for name, when in leaving.items() if when <= step]
        core.abort_request(now)
        found.left += len(now)
        leaving = {name: when for name, when in leaving.items() if when > step}
        for output in core.step():
            answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            if output.finished:
                leaving.pop(output.request_id, None)
                found.prefix_hits += bool(output.num_cached_tokens)
        step += 1
    return answers
