"""The backend for GPUs in vLLM's engine: the tokens of a model that is patched with the same package.

There is no GPU here: the engine runs on a CPU, and the kernels in Triton's interpreter.
"""

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")
pytest.importorskip("triton")

from collections.abc import Callable

from engines import Engine, World, mixed_topology, prompts_of
from interpreted_backend import interpreted

NEW_TOKENS = 3


@pytest.mark.slow
@pytest.mark.parametrize("recall", ["dense", "pattern"])
def test_prompts_in_chunks_and_decoding_in_one_batch(world: World, engine: Callable[..., Engine], recall: str) -> None:
    prompts = prompts_of(200, 40, 1)
    with interpreted(mixed_topology()) as batches:
        served = engine("mixed", recall, max_num_batched_tokens=128, max_num_seqs=4)
        found = served.generate(prompts, NEW_TOKENS)
    assert found == world.expected(prompts, "mixed", recall, NEW_TOKENS)
    most = {batch.most_queries for batch in batches}
    assert 1 in most
    assert 128 in most
    assert {batch.page_tokens for batch in batches} == {64}
