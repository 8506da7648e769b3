"""The model and packages that vLLM's engines serve; without vLLM these tests are skipped."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from engines import ENVIRONMENT, LONGEST, Engine, World, mixed_topology
from models import tiny_config, tiny_llama
from surgeon.compiler import compile_package
from surgeon.runtime import weights_id

os.environ |= ENVIRONMENT


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("served")
    model = tiny_llama(tiny_config(num_hidden_layers=4, max_position_embeddings=LONGEST, pad_token_id=None))
    model.save_pretrained(folder / "model")
    made = World(folder / "model", model)
    learned = mixed_topology()
    topologies = {
        "mixed": mixed_topology(),
        "some": mixed_topology(uncovered=(1, 2)),
        "learned": replace(learned, model=replace(learned.model, weights_sha256=weights_id(model))),
    }
    for name, topology in topologies.items():
        made.packages[name] = compile_package(topology, folder / name, dtypes=("fp32",))
    return made


@pytest.fixture
def engine(world: World) -> Iterator[Callable[..., Engine]]:
    """Makes engines, one at a time."""
    yield lambda *arguments, **options: Engine(world, *arguments, **options)
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
