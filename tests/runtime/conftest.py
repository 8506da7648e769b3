"""Fixtures of the runtime's tests: the tiny model, and packages for it that are compiled once."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from models import Compiled, collapsed_topologies, sparse_topology, tiny_llama
from surgeon.compiler import compile_package
from surgeon.runtime import load


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Packages for the tiny model in fp32: "dense", "one cluster" and "sparse"."""
    topologies = collapsed_topologies() | {"sparse": sparse_topology()}
    folder = tmp_path_factory.mktemp("packages")
    return {
        name: Compiled(topology, load(compile_package(topology, folder / name, dtypes=("fp32",)), strict=True))
        for name, topology in topologies.items()
    }


@pytest.fixture
def no_gradients(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v of two sequences of 40 tokens."""
    torch.manual_seed(0)
    return torch.randn(2, 4, 40, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32)
