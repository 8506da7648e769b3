"""The CPU kernels against the fp64 oracle, over everything that the contract allows."""

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, load
from topologies import (
    balanced_tree,
    build,
    dense_topology,
    head,
    one_cluster_topology,
    paths,
    random_topology,
    tree,
    window_topology,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GQA = ((1, 1), (2, 1), (6, 2), (4, 1), (7, 1), (8, 1))
"""Query heads and KV heads: ratios 1, 2, 3, 4, 7, 8."""


class Compile:
    """Compiles topologies, each once per run, and loads their packages."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._packages: dict[str, Package] = {}

    def folder(self, topology: Topology) -> Path:
        """The folder of a topology's package."""
        folder = self._root / topology.sha256
        return folder if folder.exists() else compile_package(topology, folder)

    def __call__(self, topology: Topology) -> Package:
        if topology.sha256 not in self._packages:
            self._packages[topology.sha256] = load(self.folder(topology), strict=True)
        return self._packages[topology.sha256]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return Compile(tmp_path_factory.mktemp("packages"))


def inputs(
    topology: Topology, batch: int, q_length: int, k_length: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v; q is a transposed view, as Transformers passes it."""
    generator = torch.Generator().manual_seed(seed)
    model = topology.model

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = random(batch, q_length, model.num_attention_heads, model.head_dim).transpose(1, 2)
    k = random(batch, model.num_key_value_heads, k_length, model.head_dim)
    v = random(batch, model.num_key_value_heads, k_length, model.head_dim)
    return q, k, v


def check(
    topology: Topology,
    package: Package,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: list[int] | None = None,
    cache_leftpad: list[int] | None = None,
    layers: tuple[int, ...] = (0,),
) -> None:
    for layer in layers:
        found = package.attention(
            layer,
            q,
            k,
            v,
            position=None if position is None else torch.tensor(position),
            cache_leftpad=None if cache_leftpad is None else torch.tensor(cache_leftpad),
        )
        expected, _ = reference.attention(topology, layer, q, k, v, position, cache_leftpad)
        assert found.shape == expected.shape
        assert found.is_contiguous()
        assert found.dtype == q.dtype
        error = reference.relative_error(found, expected)
        assert error < reference.TOLERANCE[q.dtype], (layer, q.dtype, tuple(q.shape), tuple(k.shape), position, error)


def _mixed(num_heads: int, num_kv_heads: int, head_dim: int, seed: int, **shape: int | str) -> Topology:
    values = {"num_layers": 2, "block_size": 64, "num_blocks": 12} | shape
    return random_topology(
        np.random.default_rng(seed),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **values,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", GQA, ids=lambda heads: f"gqa{heads[0] // heads[1]}")
def test_every_head_size_and_ratio(compiled: Compile, head_dim: int, heads: tuple[int, int]) -> None:
    topology = _mixed(*heads, head_dim, seed=head_dim + heads[0])
    package = compiled(topology)
    for dtype in DTYPES:
        check(topology, package, *inputs(topology, 1, 300, 300, dtype), layers=(0, 1))
        # Two sequences of different lengths, the shorter one padded on the left.
        check(topology, package, *inputs(topology, 2, 130, 130, dtype), cache_leftpad=[0, 67])
        # A later chunk of one prompt, and of a padded one; then one step of decoding.
        check(topology, package, *inputs(topology, 2, 90, 333, dtype), cache_leftpad=[0, 100])
        check(topology, package, *inputs(topology, 2, 1, 333, dtype), cache_leftpad=[0, 100], layers=(0, 1))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("beyond", ["window", "dense"])
def test_every_length(compiled: Compile, length: int, beyond: str) -> None:
    topology = _mixed(6, 2, 64, seed=5, beyond=beyond)  # 768 tokens: the longest lengths go beyond num_blocks
    package = compiled(topology)
    for dtype in DTYPES:
        check(topology, package, *inputs(topology, 2, length, length, dtype), layers=(0, 1))
        check(topology, package, *inputs(topology, 1, 1, length, dtype), layers=(0, 1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_kernels_that_clang_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "clang++")
    topology = _mixed(6, 2, 64, seed=9)
    folder = compile_package(topology, tmp_path / "kernels")
    for variant in load(folder).cpu_variants:
        package = load(folder, cpu_variant=variant)
        for dtype in DTYPES:
            check(topology, package, *inputs(topology, 2, 300, 300, dtype), cache_leftpad=[0, 67], layers=(0, 1))
            check(topology, package, *inputs(topology, 2, 1, 333, dtype), cache_leftpad=[0, 100], layers=(0, 1))
    needed = subprocess.run(
        ["objdump", "-p", folder / "cpu" / "attention.so"], capture_output=True, text=True, check=True
    )
    assert "libgomp.so" in needed.stdout  # its threads are torch's
    assert "libomp.so" not in needed.stdout


def _contiguous() -> Topology:
    rng = np.random.default_rng(1)
    return build(
        [[head(0, cut, sink=1, window=1) for cut in (1.0, 2.0, 4.0)]],
        [{"linkage": tree(16, rng, contiguous=True)}],
        num_kv_heads=3,
        head_dim=64,
        num_blocks=16,
    )


def _scattered() -> Topology:
    rng = np.random.default_rng(2)
    return build(
        [[head(0, 3.0, window=1), head(1, 2.0, window=2), head(1, 0.0, sink=2, window=1)]],
        [{"linkage": tree(16, rng, contiguous=False)}, {"paths": paths(16, 3, 3, rng), "arity": 3}],
        num_kv_heads=3,
        head_dim=64,
        num_blocks=16,
    )


def _long() -> Topology:
    rng = np.random.default_rng(3)
    return build(
        [[head(0, 20.0, window=1), head(1, 2.0, sink=1, window=3), head(0, 60.0, window=2)]],
        [{"linkage": tree(300, rng, contiguous=False)}, {"paths": paths(300, 2, 7, rng), "arity": 2}],
        num_kv_heads=1,
        head_dim=64,
        block_size=16,
        num_blocks=300,
    )


SHAPES: dict[str, Callable[[], Topology]] = {
    "contiguous clusters": _contiguous,
    "scattered clusters": _scattered,
    "300 blocks": _long,
    "one block": lambda: dense_topology(num_heads=3, head_dim=64, num_blocks=1),
    "singletons": lambda: window_topology([1, 1, 1], sink=0, head_dim=64),
    "one cluster": lambda: one_cluster_topology(num_heads=3, head_dim=64),
    "dense": lambda: dense_topology(num_heads=3, head_dim=64),
    "windows": lambda: window_topology([1, 2, 7], head_dim=64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"])
def test_every_shape_of_tree_in_every_variant(compiled: Compile, shape: str, variant: str) -> None:
    topology = SHAPES[shape]()
    fastest = compiled(topology)
    if variant not in fastest.cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    package = load(compiled.folder(topology), strict=True, cpu_variant=variant)
    assert package.cpu_variant == variant
    length = min(topology.num_blocks * topology.block_size + 100, 1500)
    for dtype in DTYPES:
        check(topology, package, *inputs(topology, 1, length, length, dtype))
        check(topology, package, *inputs(topology, 2, 77, length, dtype), cache_leftpad=[3, 40])
        check(topology, package, *inputs(topology, 2, 1, length, dtype), cache_leftpad=[0, 33])


@pytest.mark.parametrize("block_size", [16, 32, 48, 128, 256])
def test_every_block_size(compiled: Compile, block_size: int) -> None:
    topology = _mixed(4, 2, 32, seed=block_size, block_size=block_size)
    package = compiled(topology)
    for dtype in DTYPES:
        check(topology, package, *inputs(topology, 1, 700, 700, dtype), layers=(0, 1))
        check(topology, package, *inputs(topology, 2, 130, 500, dtype), cache_leftpad=[5, 201])
        check(topology, package, *inputs(topology, 2, 1, 500, dtype), cache_leftpad=[5, 201])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_longer_than_what_is_filled(compiled: Compile, dtype: torch.dtype) -> None:
    topology = _mixed(6, 2, 64, seed=9)
    package = compiled(topology)
    q, k, v = inputs(topology, 2, 40, 700, dtype)
    position = [130, 205]
    for sequence, begin in enumerate(position):  # anything after the queries' own keys must never be read
        k[sequence, :, begin + 40 :] = torch.nan
        v[sequence, :, begin + 40 :] = torch.nan
    check(topology, package, q, k, v, position=position, cache_leftpad=[0, 8])
    check(topology, package, q[:, :, -1:], k, v, position=[169, 244], cache_leftpad=[0, 8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(compiled: Compile, dtype: torch.dtype) -> None:
    topology = _mixed(4, 2, 32, seed=10)
    package = compiled(topology)
    q, k, v = inputs(topology, 2, 200, 200, dtype)
    spread = torch.zeros(2, 200, 2, 3, 64, dtype=dtype)  # [batch, token, head, k or v, two head_dims]
    spread[:, :, :, 0, :32] = k.transpose(1, 2)
    spread[:, :, :, 2, 32:] = v.transpose(1, 2)
    k_view, v_view = spread[:, :, :, 0, :32].transpose(1, 2), spread[:, :, :, 2, 32:].transpose(1, 2)
    backward = q.flip(-1).contiguous().flip(-1)
    columns = k.transpose(-1, -2).contiguous().transpose(-1, -2)  # head_dim is not the innermost axis
    assert not k_view.is_contiguous()
    assert columns.stride(-1) != 1
    for q_, k_ in itertools.product((q, backward.contiguous(), q.contiguous()), (k_view, columns)):
        assert torch.equal(package.attention(0, q_, k_, v_view), package.attention(0, q, k, v))
    check(topology, package, q, k_view, v_view)
    expanded = k[:1].expand(2, -1, -1, -1)  # stride 0
    check(topology, package, q, expanded, v)


def test_decoding_step_by_step_equals_prefill(compiled: Compile) -> None:
    topology = _mixed(6, 2, 64, seed=12, block_size=16)
    package = compiled(topology)
    q, k, v = inputs(topology, 2, 260, 260, torch.float32)
    cache_leftpad = torch.tensor([0, 21])
    whole = package.attention(0, q, k, v, cache_leftpad=cache_leftpad)
    for step in range(30, 260):
        one = package.attention(0, q[:, :, step : step + 1], k, v, position=step, cache_leftpad=cache_leftpad)
        torch.testing.assert_close(one, whole[:, step : step + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"])
@pytest.mark.parametrize("q_length", [2, 3, 6, 7, 16, 17])
def test_a_few_queries(compiled: Compile, variant: str, q_length: int) -> None:
    topology = _mixed(6, 2, 64, seed=11, block_size=16)
    if variant not in compiled(topology).cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    package = load(compiled.folder(topology), strict=True, cpu_variant=variant)
    for dtype in DTYPES:
        q, k, v = inputs(topology, 4, q_length, 300, dtype)
        # Padding across a block's border, nothing but padding, padding up to the last query, and no padding.
        position, cache_leftpad = [250, 30, 60, 283 - q_length], [9, 80, 59 + q_length, 0]
        check(topology, package, q, k, v, position=position, cache_leftpad=cache_leftpad, layers=(0, 1))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunked_prefill_equals_prefill(compiled: Compile, chunk: int) -> None:
    topology = _mixed(6, 2, 64, seed=13)
    package = compiled(topology)
    q, k, v = inputs(topology, 1, 330, 330, torch.float32)
    whole = package.attention(1, q, k, v)
    parts = [
        package.attention(1, q[:, :, begin : begin + chunk], k[:, :, : begin + chunk], v[:, :, : begin + chunk])
        for begin in range(0, 330, chunk)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_length", [1, 70])
def test_log_sum_exp(compiled: Compile, dtype: torch.dtype, q_length: int) -> None:
    topology = _mixed(6, 2, 64, seed=14)
    package = compiled(topology)
    q, k, v = inputs(topology, 2, q_length, 200, dtype)
    out, found = package.attention_with_lse(0, q, k, v, scale=0.3, cache_leftpad=torch.tensor([0, 50]))
    expected_out, expected = reference.attention(topology, 0, q, k, v, cache_leftpad=[0, 50], scale=0.3)
    assert reference.relative_error(out, expected_out) < reference.TOLERANCE[dtype]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_queries_are_zeros(compiled: Compile) -> None:
    topology = _mixed(6, 2, 64, seed=15)
    package = compiled(topology)
    q, k, v = inputs(topology, 2, 100, 100, torch.float32)
    out, lse = package.attention_with_lse(0, q, k, v, cache_leftpad=torch.tensor([30, 100]))
    assert torch.equal(out[0, :30], torch.zeros_like(out[0, :30]))
    assert torch.equal(out[1], torch.zeros_like(out[1]))  # a sequence of nothing but padding
    assert torch.isneginf(lse[0, :, :30]).all()
    assert torch.isneginf(lse[1]).all()
    assert torch.isfinite(lse[0, :, 30:]).all()
    check(topology, package, q, k, v, cache_leftpad=[30, 100])


@pytest.mark.parametrize("variant", ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"])
def test_errors_do_not_grow_with_the_length(compiled: Compile, variant: str) -> None:
    # The second head keeps the layer on the kernel; torch would take over if the whole layer were dense.
    topology = build([[{"dense": True}, head(0, 1e9)]], [{"linkage": balanced_tree(8)}], head_dim=32)
    if variant not in compiled(topology).cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    package = load(compiled.folder(topology), strict=True, cpu_variant=variant)
    q, k, v = inputs(topology, 1, 40, 30_000, torch.float32)
    check(topology, package, q, k, v)
    check(topology, package, q[:, :, -1:], k, v)


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_extreme_scores(compiled: Compile, factor: float) -> None:
    topology = _mixed(6, 2, 64, seed=16)
    package = compiled(topology)
    q, k, v = inputs(topology, 1, 300, 300, torch.float32)
    expected, _ = reference.attention(topology, 0, q * factor, k * factor, v)
    found = package.attention(0, q * factor, k * factor, v)
    # Scores of thousands have rounding errors of their own, which softmax passes on.
    assert reference.relative_error(found, expected) < (2e-6 if factor < 1 else 2e-4)


def test_a_nan_comes_out_as_a_nan(compiled: Compile) -> None:
    topology = dense_topology(num_heads=1, head_dim=64)
    package = compiled(topology)
    q, k, v = inputs(topology, 1, 100, 100, torch.float32)
    k[0, 0, 40, 3] = torch.nan
    for q_, out in ((q, package.attention(0, q, k, v)), (q[:, :, -1:], package.attention(0, q[:, :, -1:], k, v))):
        affected = torch.arange(100)[-q_.shape[2] :] >= 40
        assert torch.equal(out[0, :, 0].isnan().all(dim=-1), affected)
        assert torch.equal(out[0, :, 0].isnan().any(dim=-1), affected)


def test_results_do_not_depend_on_the_number_of_threads(compiled: Compile) -> None:
    topology = _mixed(6, 2, 64, seed=17)
    package = compiled(topology)
    q, k, v = inputs(topology, 1, 500, 500, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(package.attention(0, q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
