"""Packages of the tiny model, compiled once for all tests."""

from collections.abc import Iterator

import pytest
import torch

from models import Compiled, collapsed_topologies, sparse_topology
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
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which wait for each other long where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
