"""Under recall "pattern" an engine holds only the pages that some later token reads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import NEW_TOKENS, Engine, World, prompts_of
from surgeon.runtime import load
from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.pages.needs import groups_of


def pages_in_use(served: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that the engine generates for a prompt, and the pages in use after each step."""
    from vllm import SamplingParams

    engine: Any = served.llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
    engine.add_request("one", {"prompt_token_ids": prompt}, settings)
    free, used, tokens = pool.get_num_free_blocks(), [], []
    while engine.has_unfinished_requests():
        tokens = [list(request.outputs[0].token_ids) for request in engine.step()] or tokens
        used.append(free - pool.get_num_free_blocks())
    return tokens[0], used


def test_pages_that_nobody_reads_are_free_for_others(world: World, engine: Callable[..., Engine]) -> None:
    (prompt,) = prompts_of(900)
    found, used = pages_in_use(engine("mixed", "pattern", max_num_batched_tokens=256), prompt)
    assert [found] == world.expected([prompt], "mixed", "pattern")
    # Each layer has a table of its own. The last one has a dense head, so its 15 pages stay. The others read the first
    # block and the last four: the first page and the last three, which may have become two.
    assert 15 + 3 * 3 <= used[-2] <= 15 + 3 * 4
    assert used[-1] == 0, "and all of them once the request is done"


def test_requests_that_a_whole_cache_would_preempt(world: World, engine: Callable[..., Engine]) -> None:
    prompts = prompts_of(300, 310, 320, 290, 305, 315)
    served = engine("mixed", "pattern", num_gpu_blocks_override=125, max_num_batched_tokens=128)
    assert served.generate(prompts, 60) == world.expected(prompts, "mixed", "pattern", new_tokens=60)
    assert served.count("vllm:num_preemptions") == 0, "six pages for each of four tables of six requests would be 144"


def test_reading_a_page_that_was_freed_is_an_error(
    world: World, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = groups_of(load(world.packages["mixed"]).liveness(), 32)
    wrong = tuple(replace(group, readers=tuple(reader - 1 for reader in group.readers)) for group in wrong)
    monkeypatch.setattr("surgeon.runtime.vllm.serving._groups", lambda _: wrong)
    served = engine("mixed", "pattern")
    with pytest.raises(PatchError, match="expected a slot for every block that the queries read"):
        served.generate(prompts_of(500))
