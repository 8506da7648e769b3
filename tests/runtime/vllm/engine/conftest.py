"""The model and packages that vLLM's engines serve; without vLLM these tests are skipped."""

import gc
import os
from collections.abc import Callable, Iterator

import pytest

from engines import ENVIRONMENT, Engine, World, make_world

os.environ |= ENVIRONMENT


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture
def engine(world: World) -> Iterator[Callable[..., Engine]]:
    """Makes engines, one at a time."""
    yield lambda *arguments, **options: Engine(world, *arguments, **options)
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
