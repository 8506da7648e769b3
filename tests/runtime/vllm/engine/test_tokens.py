"""Greedy tokens of vLLM with a package are those of the Transformers model that is patched with it."""

from collections.abc import Callable

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import Engine, World, prompts_of

LENGTHS = (700, 130, 33, 512, 1, 64)


@pytest.mark.parametrize(
    ("recall", "page", "chunk"), [("dense", 64, 4096), ("dense", 128, 100), ("dense", 32, 256), ("pattern", 128, 100)]
)
def test_a_batch_whole_and_in_chunks(
    world: World, engine: Callable[..., Engine], recall: str, page: int, chunk: int
) -> None:
    prompts = prompts_of(*LENGTHS)
    found = engine("mixed", recall, block_size=page, max_num_batched_tokens=chunk).generate(prompts)
    assert found == world.expected(prompts, "mixed", recall)
    assert found != world.expected(prompts, None)


@pytest.mark.parametrize("recall", ["dense", "pattern"])
def test_prefix_hits_give_what_a_request_of_its_own_gives(
    world: World, engine: Callable[..., Engine], recall: str
) -> None:
    (first,) = prompts_of(600)
    served = engine("mixed", recall, enable_prefix_caching=True)
    answer = served.generate([first])[0]
    follow_up = [*first, *answer, *prompts_of(150)[0]]
    later = [first, first[:400], [*first[:450], *prompts_of(90)[0]], follow_up, first[:330]]
    expected = world.expected(later, "mixed", recall)
    assert [served.generate([prompt])[0] for prompt in later] == expected
    assert served.generate(later) == expected
    # All full pages but the last one's own token; under recall "dense" also none with rows that asked elsewhere.
    assert served.cached == ([576, 384, 512, 768, 320] if recall == "pattern" else served.cached)
    assert min(served.cached) > 0


@pytest.mark.parametrize("recall", ["pattern", "dense"])
def test_routed_heads_choose_what_they_choose_in_a_patched_model(
    world: World, engine: Callable[..., Engine], recall: str
) -> None:
    prompts = prompts_of(*LENGTHS)
    served = engine("routed", None if recall == "pattern" else recall)  # the default, as in patch
    assert served.generate(prompts, 60) == world.expected(prompts, "routed", recall, 60)
    sites = [layer.impl.site for layer in served.layers.values()]
    assert [site.nodes is not None for site in sites] == [True, False, True, True]


def test_routed_heads_in_chunks_of_whole_tiles_and_with_prefix_hits(
    world: World, engine: Callable[..., Engine]
) -> None:
    served = engine("routed", max_num_batched_tokens=256, enable_prefix_caching=True)
    (first,) = prompts_of(600)
    later = [first, first[:400], [*first[:450], *prompts_of(90)[0]], first]
    for prompt, answer in zip(later, world.expected(later, "routed", "pattern"), strict=True):
        assert served.generate([prompt]) == [answer]
    assert served.cached == [576]


def test_preempted_requests_go_on_as_they_began(world: World, engine: Callable[..., Engine]) -> None:
    prompts = prompts_of(300, 310, 320, 290)
    served = engine("mixed", num_gpu_blocks_override=22)
    assert served.generate(prompts, 100) == world.expected(prompts, "mixed", new_tokens=100)
    assert served.count("vllm:num_preemptions") > 0


def test_layers_that_the_package_does_not_cover_are_vllms_own(world: World, engine: Callable[..., Engine]) -> None:
    prompts = prompts_of(*LENGTHS)
    served = engine("some", max_num_batched_tokens=256)
    assert served.generate(prompts) == world.expected(prompts, "some")
    sites = [layer.impl.site for layer in served.layers.values()]
    assert [site is not None for site in sites] == [True, False, False, True]


def test_without_a_package_vllm_serves_as_ever(world: World, engine: Callable[..., Engine]) -> None:
    prompts = prompts_of(*LENGTHS)
    served = engine(None)
    assert served.generate(prompts) == world.expected(prompts, None)
    assert all(layer.impl.site is None for layer in served.layers.values())
