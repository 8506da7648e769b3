"""Torch's dense attention in place of a kernel: only where it computes the same, and `explain` says so."""

from pathlib import Path

import pytest
import torch

import reference
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.package.inspection import PackageReport, inspect
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.kernels.cpu import sdpa
from surgeon.runtime.operands import Operands
from topologies import DENSE, balanced_tree, build, dense_topology, head, window_topology

# Layer 0 is dense, layer 1 sees everything up to its smaller window and its sink.
TOPOLOGY = build(
    [[DENSE, DENSE], [DENSE, head(window=2, sink=1)]],
    [{"linkage": balanced_tree(8)}],
    num_kv_heads=1,
    head_dim=32,
    block_size=16,
)
CALLS = [(1, 40, None), (40, 40, None), (7, 40, None), (9, 60, 20), (1, 60, 30), (1, 1, None)]
"""The queries, keys and position of calls."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("package") / "kernels")


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The numbers of queries and keys of the calls that went to torch."""
    calls: list[tuple[int, int]] = []
    attend = sdpa.attend

    def counted(operands: Operands, end: int) -> torch.Tensor:
        calls.append((operands.q.shape[2], end))
        return attend(operands, end)

    monkeypatch.setattr(sdpa, "attend", counted)
    return calls


def compare(
    package: Package, topology: Topology, layer: int, queries: int, keys: int, position: int | None, padding: int = 0
) -> None:
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(2, 2, queries, 32, generator=generator)
    k, v = torch.randn(2, 2, 1, keys, 32, generator=generator)
    cache_leftpad = torch.tensor([0, padding]) if padding else None
    found = package.attention(layer, q, k, v, scale=0.3, position=position, cache_leftpad=cache_leftpad)
    positions = None if position is None else [position] * 2
    expected, _ = reference.attention(topology, layer, q, k, v, positions, [0, padding], scale=0.3)
    assert found.is_contiguous()
    assert reference.relative_error(found, expected) < reference.TOLERANCE[torch.float32]


@pytest.mark.parametrize(("queries", "keys", "position"), CALLS)
def test_a_dense_layer_on_a_slow_variant_goes_to_torch(
    folder: Path, dense_calls: list[tuple[int, int]], queries: int, keys: int, position: int | None
) -> None:
    compare(load(folder, cpu_variant="portable"), TOPOLOGY, 0, queries, keys, position)
    assert dense_calls == [(queries, keys if position is None else position + queries)]


@pytest.mark.parametrize(("keys", "goes"), [(16, True), (48, True), (49, False), (100, False)])
def test_a_sparse_layer_goes_to_torch_only_as_far_as_it_is_dense(
    folder: Path, dense_calls: list[tuple[int, int]], keys: int, goes: bool
) -> None:
    compare(load(folder, cpu_variant="portable"), TOPOLOGY, 1, keys, keys, None)
    assert bool(dense_calls) == goes


def test_padding_stays_on_the_kernel(folder: Path, dense_calls: list[tuple[int, int]]) -> None:
    compare(load(folder, cpu_variant="portable"), TOPOLOGY, 0, 40, 40, None, padding=3)
    assert dense_calls == []


def test_what_is_beyond_the_topology_is_still_refused(tmp_path: Path) -> None:
    topology = dense_topology(num_heads=2, head_dim=32, block_size=16, num_blocks=2, beyond="error")
    package = load(compile_package(topology, tmp_path / "kernels"), cpu_variant="portable")
    compare(package, topology, 0, 32, 32, None)
    with pytest.raises(TopologyError, match="beyond: error"):
        compare(package, topology, 0, 33, 33, None)


def test_a_fast_variant_keeps_its_kernels(folder: Path, dense_calls: list[tuple[int, int]]) -> None:
    package = load(folder)
    if package.cpu_variant == "portable":
        pytest.skip("this processor has no other variant")
    compare(package, TOPOLOGY, 0, 40, 40, None)
    assert dense_calls == []


def test_the_log_sum_exp_is_the_kernels(folder: Path, dense_calls: list[tuple[int, int]]) -> None:
    package = load(folder, cpu_variant="portable")
    q, k = torch.randn(1, 2, 40, 32), torch.randn(1, 1, 40, 32)
    package.attention_with_lse(0, q, k, k)
    assert dense_calls == []


def test_the_choice_is_explained(folder: Path) -> None:
    package = load(folder, cpu_variant="portable")
    slow = "portable takes 2.0 of torch's time a dense block"
    assert package.explain(0, 5000) == f"sdpa: layer 0 sees every block; {slow}"
    assert package.explain(1, 48) == f"sdpa: layer 1 sees every block; {slow}"
    assert package.explain(1, 49) == f"kernel: layer 1 sees every block only up to token 48; {slow}"
    with pytest.raises(PatchError, match=r"expected one of the layers \(0, 1\) that .*, got 2"):
        package.explain(2, 49)


def test_inspection_says_what_the_runtime_does(folder: Path) -> None:
    report = inspect(folder)
    assert isinstance(report, PackageReport)
    for variant in load(folder).cpu_variants:
        package = load(folder, cpu_variant=variant)
        (rows,) = (rows for rows in report.on_cpu if rows.variant == variant)
        for layer, length in ((0, 5000), (1, 48), (1, 49)):
            assert rows.explain(layer, length) == package.explain(layer, length)


def test_the_dense_tokens_are_those_of_the_definition(tmp_path: Path) -> None:
    for windows in ([1, 1], [3, 5], [8, 9]):
        topology = window_topology(windows, sink=1, head_dim=32, block_size=16)
        package = load(compile_package(topology, tmp_path / "kernels"), cpu_variant="portable")
        causal = torch.ones(20, 20).tril().bool().numpy()
        same = (topology.block_mask(0, 20) == causal).all(axis=(0, 2))
        first_sparse = int(same.argmin()) if not same.all() else 20
        assert package.explain(0, first_sparse * 16).startswith("sdpa")
        assert package.explain(0, first_sparse * 16 + 1).startswith("kernel")
