"""Triton kernels: right in Triton's interpreter, and compiled for GPUs that this machine need not have."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import topologies
from compiled_code import laid_out, parameters, spills
from surgeon.compiler.build_triton import build_triton
from surgeon.compiler.render_triton import render_triton, tiling
from surgeon.compiler.schedule import schedule_layers
from surgeon.compiler.specialize import specialize
from surgeon.compiler.stages import Binary, KernelSpec, Source
from surgeon.compiler.tiles import Tile, device_of
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import BuildError, TargetError
from surgeon.runtime.target import Target
from triton_interpreter import Call, interpreter, launch

Array = npt.NDArray[Any]

triton = pytest.importorskip("triton")

BLOCK = 16
TOLERANCE = {"float32": 2e-6, "float16": 1e-3}


def kernel_spec(topology: Topology, target: str = "cuda:90") -> KernelSpec:
    """The kernel of the topology's first layer."""
    return specialize(topology, schedule_layers(topology), Target.parse(target))[0]


def render_whole(spec: KernelSpec) -> Source:
    """The source of a layer whose heads are all in one kernel."""
    (source,) = render_triton(spec)
    return source


# In the interpreter


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with interpreter() as executor:
        yield executor


def make_call(
    topology: Topology,
    *,
    length: int,
    positions: Sequence[int] = (0,),
    first_keys: Sequence[int] = (0,),
    spare_keys: int = 0,
    dtype: str = "float32",
    seed: int = 0,
) -> Call:
    """Random q, k, v, where every key and value that no query may read is NaN."""
    spec = kernel_spec(topology)
    rng = np.random.default_rng(seed)
    batch, model = len(positions), topology.model
    filled = max(positions) + length
    q = rng.standard_normal((batch, length, model.num_attention_heads, model.head_dim))
    k, v = rng.standard_normal((2, batch, model.num_key_value_heads, filled + spare_keys, model.head_dim))
    for sequence, (position, first_key) in enumerate(zip(positions, first_keys, strict=True)):
        for tensor in (k, v):
            tensor[sequence, :, :first_key] = np.nan
            tensor[sequence, :, position + length :] = np.nan
    return Call(
        text=render_whole(spec).files[0].text,
        name=spec.name,
        tile_rows=tiling(spec).query_tile,
        q=q.astype(dtype),
        k=k.astype(dtype),
        v=v.astype(dtype),
        position=np.array(positions, dtype=np.int64),
        first_key=np.array(first_keys, dtype=np.int64),
        scale=model.head_dim**-0.5,
    )


def reference(topology: Topology, call: Call) -> tuple[Array, Array]:
    """Masked softmax in fp64, the mask straight from the topology's definition: out and log-sum-exp."""
    batch, length, num_heads, _ = call.q.shape
    num_keys = call.k.shape[2]
    mask = topology.block_mask(0, min(-(-num_keys // topology.block_size), row_limit(topology)))
    out = np.zeros(call.q.shape)
    lse = np.full((batch, num_heads, length), -np.inf)
    for sequence in range(batch):
        first_key = int(call.first_key[sequence])
        for query in range(length):
            own = int(call.position[sequence]) + query
            if own < first_key:
                continue
            keys = np.arange(own + 1 - first_key)
            for head in range(num_heads):
                kv_head = head * call.k.shape[1] // num_heads
                seen = mask[head, (own - first_key) // topology.block_size, keys // topology.block_size]
                k = call.k[sequence, kv_head, first_key : own + 1][seen].astype(np.float64)
                v = call.v[sequence, kv_head, first_key : own + 1][seen].astype(np.float64)
                scores = k @ call.q[sequence, query, head].astype(np.float64) * call.scale
                lse[sequence, head, query] = np.logaddexp.reduce(scores)
                out[sequence, query, head] = np.exp(scores - lse[sequence, head, query]) @ v
    return out, lse


def row_limit(topology: Topology) -> int:
    return topology.num_blocks if topology.beyond == "error" else sys.maxsize


def check(pool: Executor, topology: Topology, call: Call) -> None:
    out, lse = pool.submit(launch, call, True).result()
    expected_out, expected_lse = reference(topology, call)
    assert np.isfinite(out).all()
    tolerance = TOLERANCE[call.q.dtype.name]
    assert np.linalg.norm(out - expected_out) <= tolerance * np.linalg.norm(expected_out)
    real = np.isfinite(expected_lse)
    assert (lse[~real] == -np.inf).all()
    np.testing.assert_allclose(lse[real], expected_lse[real], rtol=1e-5, atol=1e-5)


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
    call = make_call(topology, length=1, positions=[0, BLOCK - 1, 4 * BLOCK + 2], first_keys=[0, 3, BLOCK])
    check(pool, topology, call)


def test_left_padding_counts_blocks_from_the_first_key_and_writes_zeros_before_it(pool: Executor) -> None:
    topology = scattered_clusters()
    length = 3 * BLOCK + 5
    call = make_call(topology, length=length, positions=[0, 0, 0], first_keys=[0, 5, 2 * BLOCK + 9])
    check(pool, topology, call)


def test_a_sequence_that_is_all_padding_so_far(pool: Executor) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=BLOCK + 2, positions=[4, 4], first_keys=[2 * BLOCK, 0])
    check(pool, topology, call)
    out, _ = pool.submit(launch, call, True).result()
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
    call = make_call(topology, length=BLOCK + 3, first_keys=[BLOCK])
    _, lse = pool.submit(launch, call, False).result()
    assert np.isnan(lse).all()


def test_heads_in_kernels_of_their_own_together_make_the_layer(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = scattered_clusters()
    call = make_call(topology, length=6 * BLOCK)
    monkeypatch.setattr("surgeon.compiler.render_triton.MAX_LEAVES", 1)
    sources = render_triton(kernel_spec(topology))
    assert [source.heads for source in sources] == [(0, 1), (1, 2)]
    assert [source.files[0].path for source in sources] == [
        "cuda-90/attention_000_head_00.py",
        "cuda-90/attention_000_head_01.py",
    ]
    expected_out, expected_lse = reference(topology, call)
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


def disassembly(binary: Binary, folder: Path) -> list[str]:
    """The opcodes of a cubin, in order."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary.data)
    tool = triton.knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.x]*)", text, re.MULTILINE)


def test_hopper_code_uses_tensor_cores_and_asynchronous_copies_and_does_not_spill(
    hopper: Binary, tmp_path: Path
) -> None:
    operations = {operation.split(".")[0] for operation in disassembly(hopper, tmp_path)}
    assert {"HGMMA", "LDGSTS"} <= operations
    assert not operations & {"STL", "LDL"}


def test_fp16_code_differs_from_bf16_code(hopper: Binary, tmp_path: Path) -> None:
    half = compile_kernel(mixed_heads(), "cuda:90", "fp16")
    assert any(operation.startswith("HGMMA") and "BF16" in operation for operation in disassembly(hopper, tmp_path))
    assert not any("BF16" in operation for operation in disassembly(half, tmp_path))


def test_the_manifest_entry_describes_the_binary(hopper: Binary) -> None:
    (entry,) = hopper.kernels
    assert (entry.target, entry.dtype, entry.layers) == ("cuda:90", "bf16", (0, 2))
    assert entry.file == hopper.path == "cuda-90/attention_000.bf16.cubin"
    assert entry.schedule == entry.symbol == "attention_000"
    assert entry.launch is not None
    assert entry.launch.grid == ("query_heads", "batch", "row_tiles")
    assert (entry.launch.tile_rows, entry.launch.threads) == (64, 128)
    assert 0 < entry.launch.shared_bytes <= 232_448
    assert entry.scratch_bytes == 0
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
    assert 0 < launch.shared_bytes <= device_of(Target.parse(target)).shared_bytes
    assert spills(binary, tmp_path) == 0


def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = Tile(queries=64, keys=32, warps=4, stages=2)
    monkeypatch.setattr("surgeon.compiler.render_triton.prefill_tile", lambda *_: crowded)
    assert spills(compile_kernel(mixed_heads(head_dim=256, block_size=128), "cuda:86", "bf16"), tmp_path) > 0


@pytest.mark.parametrize("target", ["cuda:61", "hip:gfx803"])
def test_a_target_without_code_generator_is_refused_by_name(target: str) -> None:
    backend, _, arch = target.partition(":")
    topology = mixed_heads()
    with pytest.raises(TargetError, match=rf"target {target}: expected {backend}: with one of .*, got {arch}; "):
        specialize(topology, schedule_layers(topology), Target.parse(target))


def test_a_missing_triton_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        TargetError, match=r"target cuda:90: expected the Python package triton, got .*pip install triton"
    ):
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
    golden("attention_triton.py.txt", render_whole(kernel_spec(mixed_heads(num_blocks=12))).files[0].text)


def test_rendering_names_the_file_after_the_kernel() -> None:
    source = render_whole(kernel_spec(mixed_heads()))
    assert [file.path for file in source.files] == ["cuda-90/attention_000.py"]
    assert source == render_whole(kernel_spec(mixed_heads()))


def test_more_blocks_of_the_same_pieces_are_the_same_source() -> None:
    small, large = (
        render_triton(kernel_spec(topologies.window_topology([1, 4, 9], num_blocks=blocks))) for blocks in (64, 1024)
    )
    assert [source.files for source in small] == [source.files for source in large]
