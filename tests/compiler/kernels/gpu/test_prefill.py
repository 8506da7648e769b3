"""Prefill kernels: correct in Triton's interpreter, and compiled for GPUs that this machine need not have."""

import dataclasses
import math
import re
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topologies
from compiled_code import laid_out, operations, parameters, spills
from gpu_sources import prefill_sources
from prefill_calls import check, expected, kernel_spec, make_call, render_whole
from processes import ignored_signals
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.kernels.gpu.row_trees import num_leaves
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import Binary
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import TargetTiles, Tile, tiles_of
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import BuildError, TargetError
from surgeon.runtime.package.target import Target
from triton_interpreter import launch

pytest.importorskip("triton")

BLOCK = 128  # at least a tile of queries


# In the interpreter


def shaped(build: Callable[..., Topology], *arguments: Any, **shape: Any) -> Topology:
    return build(*arguments, **({"block_size": BLOCK, "head_dim": 16, "num_blocks": 6} | shape))


def contiguous_clusters(**shape: Any) -> Topology:
    heads = [topologies.head(0, 1.0), topologies.head(0, 2.0, sink=1)]
    return shaped(topologies.build, [heads], [{"linkage": topologies.balanced_tree(6)}], **shape)


def scattered_clusters(**shape: Any) -> Topology:
    rng = np.random.default_rng(3)
    linkages = [topologies.tree(6, rng, contiguous=False) for _ in range(2)]
    heads = [topologies.head(index, rows[2][2], sink=index) for index, rows in enumerate(linkages)]
    return shaped(topologies.build, [heads], [{"linkage": rows} for rows in linkages], **shape)


def digit_paths(**shape: Any) -> Topology:
    digits = [[0, 1], [1, 0], [2, 2], [0, 1], [1, 2], [0, 0]]
    heads = [topologies.head(0, 0.0), topologies.head(0, 1.0, window=2)]
    return shaped(topologies.build, [heads], [{"paths": digits, "arity": 3}], **shape)


TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    "windows": lambda **shape: shaped(topologies.window_topology, [1, 3], **shape),
    "contiguous clusters": contiguous_clusters,
    "scattered clusters": scattered_clusters,
    "digit paths": digit_paths,
    "dense": lambda **shape: shaped(topologies.dense_topology, num_heads=2, **shape),
    "one cluster": lambda **shape: shaped(topologies.one_cluster_topology, num_heads=2, **shape),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_prefill_equals_the_masked_reference(pool: Executor, name: str, dtype: str) -> None:
    topology = TOPOLOGIES[name]()
    check(pool, topology, make_call(topology, length=6 * BLOCK, dtype=dtype))


@pytest.mark.parametrize("beyond", ["window", "dense"])
def test_rows_beyond_the_topology(pool: Executor, beyond: str) -> None:
    topology = contiguous_clusters(beyond=beyond)
    check(pool, topology, make_call(topology, length=3 * BLOCK, positions=[5 * BLOCK]))


def test_rows_that_the_topology_refuses_are_left_alone(pool: Executor) -> None:
    topology = contiguous_clusters(beyond="error")
    call = make_call(topology, length=2 * BLOCK, positions=[5 * BLOCK])
    out, lse = pool.submit(launch, call, True).result()
    assert np.isnan(out[:, BLOCK:]).all()
    assert np.isnan(lse[:, :, BLOCK:]).all()
    inside = make_call(topology, length=BLOCK, positions=[5 * BLOCK])
    check(pool, topology, inside)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 5])
def test_ragged_lengths(pool: Executor, length: int) -> None:
    topology = scattered_clusters()
    check(pool, topology, make_call(topology, length=length))


def test_a_chunk_that_starts_inside_a_block_of_a_longer_cache(pool: Executor) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=2 * BLOCK + 3, positions=[BLOCK + 7], spare_keys=BLOCK + 1)
    check(pool, topology, call)


def test_decode_of_sequences_at_different_positions(pool: Executor) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=1, positions=[0, BLOCK - 1, 4 * BLOCK + 2], cache_leftpads=[0, 3, BLOCK])
    check(pool, topology, call)


def test_left_padding_counts_blocks_from_the_first_key_and_writes_zeros_before_it(pool: Executor) -> None:
    topology = scattered_clusters()
    length = 3 * BLOCK + 5
    call = make_call(topology, length=length, positions=[0, 0, 0], cache_leftpads=[0, 5, 2 * BLOCK + 9])
    check(pool, topology, call)


def test_a_sequence_that_is_all_padding_so_far(pool: Executor) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=BLOCK + 2, positions=[4, 4], cache_leftpads=[2 * BLOCK, 0])
    out = check(pool, topology, call)
    assert not out[0, : 2 * BLOCK - 4].any()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (3, 1), (6, 2)])
def test_query_heads_share_kv_heads(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    topology = shaped(topologies.window_topology, [1, 2, 3, 1, 2, 3][:num_heads], num_kv_heads=num_kv_heads)
    check(pool, topology, make_call(topology, length=2 * BLOCK + 1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_head_sizes(pool: Executor, head_dim: int, dtype: str) -> None:
    topology = contiguous_clusters(head_dim=head_dim)
    check(pool, topology, make_call(topology, length=3 * BLOCK + 2, dtype=dtype))


@pytest.mark.parametrize(("block_size", "head_dim"), [(128, 16), (256, 16), (64, 256)])
def test_blocks_of_several_tiles(pool: Executor, block_size: int, head_dim: int) -> None:
    topology = topologies.window_topology([1, 2], sink=1, block_size=block_size, head_dim=head_dim, num_blocks=4)
    check(pool, topology, make_call(topology, length=block_size + 30, positions=[2 * block_size - 20]))


def test_log_sum_exp_is_left_alone_unless_asked_for(pool: Executor) -> None:
    topology = contiguous_clusters()
    call = make_call(topology, length=BLOCK + 3, cache_leftpads=[BLOCK])
    _, lse = pool.submit(launch, call, False).result()
    assert np.isnan(lse).all()


def test_heads_in_kernels_of_their_own_together_make_the_layer(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=6 * BLOCK)
    leaves = max(map(num_leaves, kernel_spec(topology).schedule.heads))
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", leaves)
    sources = prefill_sources([kernel_spec(topology)])
    assert [source.heads for source in sources] == [(0, 1), (1, 2)]
    assert [source.files[0].path for source in sources] == [
        "cuda-90/attention_000_head_00.py",
        "cuda-90/attention_000_head_01.py",
    ]
    expected_out, expected_lse = expected(topology, call)
    for head, source in enumerate(sources):
        part = dataclasses.replace(
            call, text=source.files[0].text, name=Path(source.files[0].path).stem, heads=source.heads
        )
        out, lse = pool.submit(launch, part, True).result()
        assert np.isnan(out[:, :, 1 - head]).all()
        np.testing.assert_allclose(out[:, :, head], expected_out[:, :, head], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse[:, head], expected_lse[:, head], rtol=1e-5, atol=1e-5)


# Compiled


def compile_kernel(topology: Topology, target: str, dtype: str) -> Binary:
    return build_triton(render_whole(kernel_spec(topology, target)), dtype)


def mixed_heads(**shape: Any) -> Topology:
    rng = np.random.default_rng(1)
    heads = [topologies.DENSE, topologies.head(0, 0.0, 1, 2), topologies.head(0, 1.0, 1, 1), topologies.DENSE]
    return topologies.build(
        [heads, heads[:1] * 4, heads],
        [{"linkage": topologies.tree(12, rng, contiguous=False)}],
        **({"block_size": 64, "head_dim": 64, "num_kv_heads": 2, "num_blocks": 12} | shape),
    )


@pytest.fixture(scope="module")
def hopper() -> Binary:
    return compile_kernel(mixed_heads(), "cuda:90", "bf16")


def test_hopper_code_uses_tensor_cores_and_asynchronous_copies_and_does_not_spill(
    hopper: Binary, tmp_path: Path
) -> None:
    found = {operation.split(".")[0] for operation in operations(hopper, tmp_path)}
    assert {"HGMMA", "LDGSTS"} <= found
    assert not found & {"STL", "LDL"}


def test_fp16_code_differs_from_bf16_code(hopper: Binary, tmp_path: Path) -> None:
    half = compile_kernel(mixed_heads(), "cuda:90", "fp16")
    assert any(operation.startswith("HGMMA") and "BF16" in operation for operation in operations(hopper, tmp_path))
    assert not any("BF16" in operation for operation in operations(half, tmp_path))


def test_the_manifest_entry_describes_the_binary(hopper: Binary) -> None:
    (entry,) = hopper.kernels
    assert (entry.target, entry.dtype, entry.layers) == ("cuda:90", "bf16", (0, 2))
    assert entry.file == hopper.path == "cuda-90/attention_000.bf16.cubin"
    assert entry.schedule == entry.symbol == "attention_000"
    assert entry.launch is not None
    assert entry.launch.grid == ("query_heads", "batch", "row_tiles")
    assert (entry.launch.tile_rows, entry.launch.threads) == (128, 256)
    assert 0 < entry.launch.shared_bytes <= 232_448
    assert hopper.tools[0].name == "triton"
    assert hopper.data.startswith(b"\x7fELF")


def test_arguments_are_the_binary_interface(hopper: Binary, tmp_path: Path) -> None:
    assert parameters(hopper, tmp_path) == laid_out(hopper.kernels[0].arguments)


def test_compiling_again_gives_the_same_bytes_and_no_path(hopper: Binary) -> None:
    assert compile_kernel(mixed_heads(), "cuda:90", "bf16") == hopper
    for trace in (b"/tmp", b"attention_000.py", str(Path.home()).encode()):
        assert trace not in hopper.data


EVERY_TARGET = [f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)] + ["hip:gfx90a", "hip:gfx942", "hip:gfx950"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head_dim"),
    [(target, 128) for target in EVERY_TARGET]
    + [("cuda:80", 80), ("cuda:86", 80), ("cuda:80", 256), ("cuda:86", 256), ("cuda:90", 256), ("hip:gfx942", 256)],
)
def test_every_target_builds_within_its_registers_and_shared_memory(target: str, head_dim: int, tmp_path: Path) -> None:
    binary = compile_kernel(mixed_heads(head_dim=head_dim, block_size=128), target, "bf16")
    launch = binary.kernels[0].launch
    assert launch is not None
    assert 0 < launch.shared_bytes <= tiles_of(Target.parse(target)).device.shared_bytes
    assert spills(binary, tmp_path) == 0


def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = Tile(queries=64, keys=32, warps=4, stages=2)
    monkeypatch.setattr(TargetTiles, "prefill_tile", lambda *_: crowded)
    assert spills(compile_kernel(mixed_heads(head_dim=256, block_size=128), "cuda:86", "bf16"), tmp_path) > 0


def test_a_compile_leaves_signals_as_they_were() -> None:
    """LLVM takes them: a file that grows too large would from then on kill the process."""
    compile_kernel(mixed_heads(), "cuda:90", "bf16")
    assert signal.SIGXFSZ in ignored_signals()


@pytest.mark.parametrize("target", ["cuda:61", "hip:gfx803"])
def test_a_target_without_code_generator_is_refused_by_name(target: str) -> None:
    backend, _, arch = target.partition(":")
    topology = mixed_heads()
    with pytest.raises(TargetError, match=rf"target {target}: expected {backend}: with one of .*, got {arch}; "):
        specialize_gpu(topology, schedule_layers(topology), Target.parse(target))


def test_a_missing_triton_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    line = (
        r"target cuda:90: expected the Python package triton, got none; "
        r"run pip install 'surgeon-compile\[gpu\]', or leave the target out"
    )
    with pytest.raises(TargetError, match=line):
        compile_kernel(mixed_heads(), "cuda:90", "fp16")


def test_a_source_that_does_not_compile_is_a_build_error(capsys: pytest.CaptureFixture[str]) -> None:
    source = render_whole(kernel_spec(mixed_heads()))
    (file,) = source.files
    broken = dataclasses.replace(
        source, files=(dataclasses.replace(file, text=file.text.replace("tl.dot(query,", "tl.dot(no_such_name,")),)
    )
    with pytest.raises(BuildError, match=r"attention_000 for cuda:90, fp16: .*no_such_name is not defined"):
        build_triton(broken, "fp16")
    assert capsys.readouterr().out == ""


# Rendered


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("attention_triton.py.txt", render_whole(kernel_spec(mixed_heads(block_size=128))).files[0].text)
    golden("attention_tiles_triton.py.txt", render_whole(kernel_spec(mixed_heads(block_size=16))).files[0].text)


def test_rendering_names_the_file_after_the_kernel() -> None:
    source = render_whole(kernel_spec(mixed_heads()))
    assert [file.path for file in source.files] == ["cuda-90/attention_000.py"]
    assert source == render_whole(kernel_spec(mixed_heads()))


def quarters(num_blocks: int, block_size: int) -> Topology:
    """Clusters of a quarter of the sequence each, however long it is, and windows."""
    heads = [topologies.head(0, math.log2(num_blocks) - 2, 1, 2), topologies.head(0, 0.0, 1, 9), topologies.DENSE]
    tree = {"linkage": topologies.balanced_tree(num_blocks)}
    return topologies.build([heads], [tree], num_blocks=num_blocks, block_size=block_size)


@pytest.mark.parametrize("block_size", [32, 64, 128])  # the first two are less than a tile
def test_more_blocks_of_the_same_pieces_are_the_same_source_but_for_numbers(block_size: int) -> None:
    specs = [kernel_spec(quarters(num_blocks, block_size)) for num_blocks in (64, 1024)]
    small, large = (sum(len(head.pieces) for head in spec.schedule.heads) for spec in specs)
    assert small == large
    short, long = (render_whole(spec).files[0].text for spec in specs)
    assert short != long
    assert re.sub(r"\d+", "n", short) == re.sub(r"\d+", "n", long)


def test_more_blocks_seen_by_the_same_windows_are_the_same_source() -> None:
    small, large = (
        prefill_sources([kernel_spec(topologies.window_topology([1, 4, 9], num_blocks=blocks))])
        for blocks in (64, 1024)
    )
    assert [source.files for source in small] == [source.files for source in large]
