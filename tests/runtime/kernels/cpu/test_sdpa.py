"""Torch's dense attention in place of a kernel: only where it computes the same, and `explain` says so."""

from pathlib import Path

import pytest
import torch

import reference
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.package.inspection import PackageReport, inspect
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.kernels.cpu import rates, sdpa
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


RATES = {
    "portable": {"fp32": {"decode": 0.8, "decode-mha": 1.2, "64": 0.5, "4096": 0.25}, "bf16": {"64": 0.25}},
    "x86_64_v3": {"fp32": {"64": 1.25}},
}
"""Stand for what was measured, so that it does not matter where these tests run."""


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = dict.fromkeys(rates.VARIANTS, RATES["x86_64_v3"]) | RATES
    monkeypatch.setattr(rates, "_measured", lambda: {"avx2": variants})


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
    level = package.kernels.devices.cpu.dense_rows.level
    time = f"of dense attention's time, {level}"
    dense = f"portable takes 2 (fp32), 4 (bf16), 1 (fp16) {time}"
    assert package.explain(0, 48) == f"sdpa (fp32, bf16), kernel (fp16): layer 0 sees every block; {dense}"
    assert package.explain(1, 48) == f"sdpa (fp32, bf16), kernel (fp16): layer 1 sees every block; {dense}"
    # The window of one of the heads lacks a block of the ten.
    assert package.explain(1, 49) == (
        "kernel: layer 1 sees every block only up to token 48, 95% of them up to 49; "
        f"portable takes 1.9 (fp32), 3.8 (bf16), 0.95 (fp16) {time}, which gives another result"
    )
    assert "takes 4 (fp32, bf16), 1 (fp16)" in package.explain(0, 5000)
    with pytest.raises(PatchError, match=r"expected one of the layers \(0, 1\) that .*, got 2"):
        package.explain(2, 49)


def test_each_dtype_and_length_has_a_rate_of_its_own(folder: Path, dense_calls: list[tuple[int, int]]) -> None:
    package = load(folder, cpu_variant="portable")
    for dtype, queries in ((torch.float32, 40), (torch.bfloat16, 1), (torch.float16, 40), (torch.float32, 1)):
        q, k = torch.randn(1, 2, queries, 32, dtype=dtype), torch.randn(1, 1, 40, 32, dtype=dtype)
        package.attention(0, q, k, k)
    assert dense_calls == [(40, 40), (1, 40), (1, 40)]  # there is no rate of fp16


def test_the_log_says_what_runs_and_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="surgeon"):
        package = load(folder, cpu_variant="portable")
        compare(package, TOPOLOGY, 0, 40, 40, None)
        compare(package, TOPOLOGY, 1, 49, 49, None)
    runs_on, why, sdpa_call = (line for line in caplog.messages if "without Python" not in line)
    assert ": runs on portable; here do not run: " in runs_on
    assert why == "layer 0: portable would take 2 of dense attention's time in fp32"
    assert sdpa_call == "attention of 40 queries over 40 keys by scaled_dot_product_attention"


def test_rotary_calls_go_to_torch_too(
    folder: Path, dense_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(2, 2, 40, 32), torch.randn(2, 1, 40, 32), torch.randn(2, 1, 40, 32)
    angles = (torch.arange(40)[:, None] * 0.3 ** torch.arange(16)).repeat(1, 2)[None]
    call = Operands(q, k, v, None, None, 0.3), angles.cos(), angles.sin()
    by_torch = load(folder, cpu_variant="portable").kernels.run_rotary(0, *call)
    assert dense_calls == [(40, 40)]
    monkeypatch.setattr(rates, "_measured", dict)
    by_kernel = load(folder, cpu_variant="portable").kernels.run_rotary(0, *call)
    assert dense_calls == [(40, 40)]
    torch.testing.assert_close(by_torch, by_kernel, rtol=1e-5, atol=1e-5)


def test_query_heads_of_their_own_decode_at_another_rate(tmp_path: Path, dense_calls: list[tuple[int, int]]) -> None:
    topology = dense_topology(num_heads=1, head_dim=32, block_size=16, num_blocks=8)
    package = load(compile_package(topology, tmp_path / "kernels"), cpu_variant="portable")
    k = torch.randn(1, 1, 40, 32)
    package.attention(0, k[:, :, -1:], k, k)
    assert dense_calls == []
    package.attention(0, k[:, :, -2:], k, k)
    assert dense_calls == [(2, 40)]


@pytest.mark.parametrize(
    ("features", "without", "level"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, (), "amx"),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, ("amx",), "avx512_bf16"),
        ({"avx2", "avx512f"}, (), "avx512"),
        ({"avx2"}, (), "avx2"),
        ({"asimd"}, (), "other"),
    ],
)
def test_the_level_of_a_processor(features: set[str], without: tuple[str, ...], level: str) -> None:
    assert rates.processor_level(features, without) == level


def test_a_level_that_was_not_measured_takes_the_next_below(monkeypatch: pytest.MonkeyPatch) -> None:
    amx, avx2 = {"fp32": {"64": 2.0}}, {"fp32": {"64": 3.0}}
    monkeypatch.setattr(rates, "_measured", lambda: {"avx2": {"portable": avx2}, "amx": {"portable": amx}})
    assert rates.rates_of("portable", "amx") == amx
    for level in ("avx512_bf16", "avx512", "avx2", "other"):
        assert rates.rates_of("portable", level) == avx2
    assert rates.rates_of("another", "amx") == {}


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
        assert package.explain(0, first_sparse * 16 + 1).startswith("kernel:")
