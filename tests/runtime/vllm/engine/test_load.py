"""Engines under load: a full cache, requests longer than the topology, clients that leave."""

from collections.abc import Callable

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import LONGEST, NEW_TOKENS, Engine, World, prompts_of
from serving_soak import PAGES, RECALLS, SETTINGS, mixed_requests, serve_mixed


@pytest.mark.slow
@pytest.mark.parametrize("recall", RECALLS)
def test_mixed_requests_get_what_each_gets_alone(world: World, engine: Callable[..., Engine], recall: str) -> None:
    served = engine("mixed", recall, num_gpu_blocks_override=PAGES[recall], **SETTINGS)
    found = serve_mixed(world, served, mixed_requests(40), recall)
    assert found.faults == []
    assert found.requests == 40
    assert min(found.left, found.preemptions, found.prefix_hits) > 0, "what the requests are to meet"


@pytest.mark.parametrize("recall", RECALLS)
def test_requests_that_fill_the_cache_wait_for_each_other(
    world: World, engine: Callable[..., Engine], recall: str
) -> None:
    prompts = prompts_of(LONGEST - NEW_TOKENS, LONGEST - NEW_TOKENS - 1, 40)
    pages = LONGEST // 64 * (4 if recall == "pattern" else 1) + 1  # and vLLM's own, which is never used
    served = engine("mixed", recall, num_gpu_blocks_override=pages)
    assert served.free_pages == pages - 1
    assert served.generate(prompts) == world.expected(prompts, "mixed", recall)
    assert served.free_pages == pages - 1


@pytest.mark.parametrize(("beyond", "recall"), [("window", "pattern"), ("window", "dense"), ("dense", "pattern")])
def test_requests_longer_than_the_topology(
    world: World, engine: Callable[..., Engine], beyond: str, recall: str
) -> None:
    prompts = prompts_of(500, 513, 700, 1000, 60)  # the topology covers 512
    found = engine(beyond, recall, max_num_batched_tokens=200).generate(prompts)
    assert found == world.expected(prompts, beyond, recall)


def test_a_request_longer_than_a_topology_that_ends_is_refused_alone(
    world: World, engine: Callable[..., Engine]
) -> None:
    served = engine("error", max_model_len=512)
    with pytest.raises(Exception, match="maximum context length is 512"):
        served.generate(prompts_of(513))
    prompts = prompts_of(512 - NEW_TOKENS, 30)
    assert served.generate(prompts) == world.expected(prompts, "error")
