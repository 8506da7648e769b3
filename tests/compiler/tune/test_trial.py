"""Trials of a candidate: compiled, checked and timed, here on the CPU, which has no tiles, by a test's clock."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from surgeon.compiler.specs.tiles import tiles_of
from surgeon.compiler.tune.exact import sampled_error
from surgeon.compiler.tune.trial import Bench
from surgeon.runtime import Package
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.target import Target
from topologies import random_topology

TILES = tiles_of(Target.parse("cuda:90"))
TOPOLOGY = random_topology(
    np.random.default_rng(3), num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, num_blocks=9
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    def clock(call: Callable[[], object], without_host: bool) -> float:
        call()
        return 2.0 if without_host else 1.0

    return Bench(TOPOLOGY, Target("cpu"), torch.device("cpu"), clock, tmp_path)


def test_each_phase_is_checked_and_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    attention = Package.attention

    def counted(package: Package, layer: int, q: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        lengths.append(q.shape[2])
        return attention(package, layer, q, *more)

    monkeypatch.setattr(Package, "attention", counted)
    assert bench.measure(TILES, "prefill") == 1.0
    assert bench.measure(TILES, "decode") == 2.0
    assert lengths == [144, 144, 1, 1]  # each once to check it, once for the clock


def test_a_kernel_that_computes_something_else_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Package.attention
    monkeypatch.setattr(Package, "attention", lambda *arguments: attention(*arguments) * 1.01)
    with pytest.raises(PackageError, match=r"decode on cpu: expected attention to a relative error of 0.005, got"):
        bench.measure(TILES, "decode")


@pytest.mark.parametrize("q_length", [144, 20, 1])
def test_the_sampled_error_is_that_of_the_definition(q_length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, q_length, 32, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 144, 32, generator=generator, dtype=torch.float64)
    mask = torch.from_numpy(TOPOLOGY.block_mask(0, 9))
    expected, _ = reference.attention(TOPOLOGY, 0, q, k, v)
    assert sampled_error(mask, 16, q, k, v, expected) < 1e-12
    assert sampled_error(mask, 16, q, k, v, expected * 1.25) == pytest.approx(0.25)
