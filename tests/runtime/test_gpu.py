"""The launcher of GPU kernels, against stand-ins of the drivers that write down what they are asked to do."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from gpu_standin import FakeStream, OnGpu, Standin, compile_standins, on_gpu, unpacked
from surgeon.compiler import compile_package
from surgeon.compiler.decision_tree import num_leaves
from surgeon.compiler.decode_table import decode_table
from surgeon.compiler.interfaces import INTERFACES
from surgeon.compiler.schedule import schedule_layers
from surgeon.runtime import load
from surgeon.runtime.driver_ctypes import CudaDriver, HipDriver
from surgeon.runtime.drivers import Driver
from surgeon.runtime.errors import PackageError, PatchError, TargetError, TopologyError
from surgeon.runtime.gpu import ARGUMENT_TYPES, GRID_AXES, PHASES, PRECONDITIONS, GpuKernels, choose_target, target_of
from surgeon.runtime.manifest import Argument, KernelEntry
from surgeon.runtime.package import PackageFiles, read_package
from surgeon.runtime.target import Target
from topologies import window_topology

pytest.importorskip("triton")

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 128, 128
STREAM = 0x5EED
PROCESSORS = 6
TARGETS = {"cuda": "cuda:90", "hip": "hip:gfx942"}


def topology(beyond: str = "window") -> Any:
    return window_topology(
        [1, 2, 1, 2], num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, num_layers=2, beyond=beyond
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for both vendors' GPUs and the CPU."""
    out = tmp_path_factory.mktemp("gpu") / "kernels"
    return compile_package(topology(), out, ["cpu", *TARGETS.values()], dtypes=["bf16"])


@pytest.fixture(scope="module")
def files(folder: Path) -> PackageFiles:
    return read_package(folder)


@pytest.fixture(scope="session")
def standin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drivers")
    compile_standins(made)
    return made


@pytest.fixture(params=["cuda.core", "cuda", "hip"])
def way(request: pytest.FixtureRequest) -> str:
    """The way to a driver: cuda.core, or a vendor's library by ctypes."""
    return str(request.param)


@pytest.fixture
def backend(way: str) -> str:
    return way.removesuffix(".core")


@pytest.fixture
def standin(standin_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: FakeStream(STREAM))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, _device: tensor)
    found = Standin(standin_folder, backend)
    found.log()
    yield found
    found.log()


@pytest.fixture
def driver(standin: Standin, way: str) -> Driver:
    if way == "cuda.core":
        pytest.importorskip("cuda.core")
        from surgeon.runtime.driver_cuda_core import CudaCoreDriver

        return CudaCoreDriver()
    return CudaDriver() if way == "cuda" else HipDriver()


only_cuda = pytest.mark.parametrize("way", ["cuda.core", "cuda"])
by_any_way = pytest.mark.parametrize("way", ["cuda"])  # what follows has nothing to do with the driver

LOADS = {"cuda.core": "cuLibraryLoadData", "cuda": "cuModuleLoadData", "hip": "hipModuleLoadData"}
LAUNCHES = {"cuda.core": "cuLaunchKernelEx", "cuda": "cuLaunchKernel", "hip": "hipModuleLaunchKernel"}
ATTRIBUTES = {"cuda.core": "cuKernelSetAttribute", "cuda": "cuFuncSetAttribute"}


def tensors(q_length: int, k_length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q as a transposed view, as projections leave it; k and v as a cache has them."""
    q = torch.zeros((batch, q_length, HEADS, HEAD_DIM), dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.zeros((2, batch, KV_HEADS, k_length, HEAD_DIM), dtype=torch.bfloat16)
    return q, k, v


def kernels(files: PackageFiles, backend: str, driver: Driver, device: int = 0, strict: bool = True) -> GpuKernels:
    return GpuKernels(files, Target.parse(TARGETS[backend]), device, PROCESSORS, strict, driver)


def entry_of(files: PackageFiles, backend: str, phase: str = "prefill") -> KernelEntry:
    return next(
        kernel for kernel in files.manifest.kernels if (kernel.target, kernel.phase) == (TARGETS[backend], phase)
    )


def launches(standin: Standin) -> list[dict[str, Any]]:
    return [call for call in standin.log() if call["call"] in LAUNCHES.values()]


def arguments(entry: KernelEntry, launch: dict[str, Any]) -> dict[str, int | float]:
    values = unpacked(launch["values"], [argument.type for argument in entry.arguments])
    return dict(zip((argument.name for argument in entry.arguments), values, strict=True))


def test_a_launch_hands_over_every_argument_bit_by_bit(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    q, k, v = tensors(q_length=150, k_length=400)
    position, first_key = torch.tensor([200, 250]), torch.tensor([0, 7])
    lse = torch.empty((2, HEADS, 150))
    standin.log()
    out = gpu.attend(1, q, k, v, position, first_key, 0.125, lse)
    (launch,) = launches(standin)
    assert arguments(entry_of(files, backend), launch) == {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "first_key": first_key.data_ptr(),
        "position": position.data_ptr(),
        "q_batch_stride": 150 * HEADS * HEAD_DIM,
        "q_head_stride": HEAD_DIM,
        "q_token_stride": HEADS * HEAD_DIM,
        "k_batch_stride": KV_HEADS * 400 * HEAD_DIM,
        "k_head_stride": 400 * HEAD_DIM,
        "k_token_stride": HEAD_DIM,
        "v_batch_stride": KV_HEADS * 400 * HEAD_DIM,
        "v_head_stride": 400 * HEAD_DIM,
        "v_token_stride": HEAD_DIM,
        "num_queries": 150,
        "write_lse": 1,
        "scale": 0.125,
        "global_scratch": 0,
        "profile_scratch": 0,
    }
    assert out.shape == (2, 150, HEADS, HEAD_DIM)
    assert out.is_contiguous()
    geometry = entry_of(files, backend).launch
    assert geometry is not None
    assert launch["grid"] == [HEADS, 2, -(-150 // geometry.tile_rows) + 1]
    assert launch["block"] == [geometry.threads, 1, 1]
    assert (launch["shared"], launch["stream"]) == (geometry.shared_bytes, STREAM)


def test_code_is_loaded_once_a_kernel_into_the_device_that_launches_it(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    first, second = kernels(files, backend, driver), kernels(files, backend, driver, device=1)
    loads = [call for call in standin.log() if call["call"] == LOADS[way]]
    sizes = [len(files.files[entry_of(files, backend, phase).file]) for phase in PHASES]
    assert [call["bytes"] for call in loads] == sizes * 2
    q, k, v = tensors(2, 300)
    for gpu in (first, second, first):
        gpu.attend(0, q, k, v, None, None, 1.0, None)
    found = launches(standin)
    assert [launch["place"] for launch in found] == ([100, 101, 100] if backend == "cuda" else [0, 1, 0])
    assert found[0]["function"] == found[2]["function"] != found[1]["function"]


@pytest.mark.parametrize("way", ["hip"])
def test_hip_leaves_the_current_device_as_it_was(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    kernels(files, backend, driver, device=3)
    devices = [call["device"] for call in standin.log() if call["call"] == "hipSetDevice"]
    assert devices == [3, 0] * len(PHASES)


@only_cuda
def test_more_than_48_kib_of_shared_memory_are_asked_for_at_load(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    launch = entry_of(files, backend).launch
    assert launch is not None
    assert launch.shared_bytes > 48 * 1024
    kernels(files, backend, driver)
    calls = [call for call in standin.log() if call["call"] == ATTRIBUTES[way]]
    large = [entry_of(files, backend, phase).launch for phase in ("prefill", "decode")]
    assert [(call["attribute"], call["value"]) for call in calls] == [
        (8, found and found.shared_bytes) for found in large
    ]

    standin.fail(ATTRIBUTES[way], 1)
    with pytest.raises(TargetError, match=rf"a device with {launch.shared_bytes} bytes.*got .*ERROR_INVALID_VALUE"):
        kernels(files, backend, driver)
    standin.fail(ATTRIBUTES[way], 0)


def test_positions_that_are_not_given_follow_from_the_lengths(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []
    new_full = torch.Tensor.new_full
    monkeypatch.setattr(
        torch.Tensor, "new_full", lambda *args, **options: made.append(new_full(*args, **options)) or made[-1]
    )
    gpu = kernels(files, backend, driver)
    standin.log()
    gpu.attend(0, *tensors(3, 300), None, None, 1.0, None)
    position, first_key = made
    assert (position.tolist(), first_key.tolist()) == ([297, 297], [0, 0])
    (launch,) = launches(standin)
    found = arguments(entry_of(files, backend), launch)
    assert (found["position"], found["first_key"]) == (position.data_ptr(), first_key.data_ptr())
    assert (found["lse"], found["write_lse"]) == (0, 0)


def test_32_bit_positions_are_widened(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    position = torch.tensor([5, 6], dtype=torch.int32)
    keep: list[torch.Tensor] = []
    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda *args, **options: keep.append(to(*args, **options)) or keep[-1])
        gpu.attend(0, *tensors(2, 300), position, None, 1.0, None)
    (launch,) = launches(standin)
    address = arguments(entry_of(files, backend), launch)["position"]
    assert list((ctypes.c_int64 * 2).from_address(int(address))) == [5, 6]


def test_one_query_runs_on_splits_of_the_keys_that_are_then_joined(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = tensors(q_length=1, k_length=700)
    position, first_key = torch.tensor([600, 650]), torch.tensor([0, 7])
    lse = torch.empty((2, HEADS, 1))
    out = gpu.attend(1, q, k, v, position, first_key, 0.125, lse)
    decode, reduce = launches(standin)
    splits = 2 * PROCESSORS // (2 * KV_HEADS)
    assert decode["grid"] == [KV_HEADS, 2, splits]
    assert reduce["grid"] == [HEADS, 2, 1]
    assert decode["stream"] == reduce["stream"] == STREAM
    first = arguments(entry_of(files, backend, "decode"), decode)
    second = arguments(entry_of(files, backend, "reduce"), reduce)
    assert {name: first[name] for name in ("q", "k", "v", "position", "first_key", "scale")} == {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "position": position.data_ptr(),
        "first_key": first_key.data_ptr(),
        "scale": 0.125,
    }
    assert first["k_head_stride"] == 700 * HEAD_DIM
    assert (first["partial"], first["partial_lse"]) == (second["partial"], second["partial_lse"])
    assert (second["out"], second["lse"], second["write_lse"]) == (out.data_ptr(), lse.data_ptr(), 1)
    assert second["num_splits"] == splits
    table = decode_table(schedule_layers(topology())[1])
    for name, expected in (("rows", table.rows), ("plans", table.plans), ("segments", table.segments)):
        found = (ctypes.c_int32 * expected.size).from_address(int(first[f"table_{name}"]))
        assert list(found) == expected.flatten().tolist()
    assert first["num_table_rows"] == table.rows.shape[1]


@by_any_way
def test_heads_in_kernels_of_their_own_are_launched_one_after_the_other(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = max(map(num_leaves, schedule_layers(topology())[0].heads))
    monkeypatch.setattr("surgeon.compiler.render_triton.MAX_LEAVES", leaves)
    split = read_package(compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"]))
    entries = [entry for entry in split.manifest.kernels if entry.phase == "prefill"]
    assert [entry.heads for entry in entries] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    gpu = kernels(split, backend, driver)
    standin.log()
    out = gpu.attend(1, *tensors(5, 300), None, None, 1.0, None)
    found = launches(standin)
    assert [launch["grid"][:2] for launch in found] == [[1, 2]] * 4
    assert len({launch["function"] for launch in found}) == 4
    assert {arguments(entry_of(split, backend), launch)["out"] for launch in found} == {out.data_ptr()}


@pytest.mark.parametrize(("k_length", "splits"), [(1, 1), (129, 2), (100_000, 6)])
@pytest.mark.parametrize("way", ["cuda"])
def test_short_sequences_are_cut_into_fewer_splits(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, k_length: int, splits: int
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    gpu.attend(0, *tensors(1, k_length, batch=1), None, None, 1.0, None)
    assert launches(standin)[0]["grid"] == [KV_HEADS, 1, splits]


# What the kernels rely on


def misaligned(shape: tuple[int, ...], offset: int) -> torch.Tensor:
    flat = torch.arange(torch.Size(shape).numel() + offset, dtype=torch.float32).to(torch.bfloat16)
    return flat[offset:].view(shape)


def unfit() -> dict[str, torch.Tensor]:
    """Keys that break one precondition each."""
    shape = (2, KV_HEADS, 300, HEAD_DIM)
    return {
        "address": misaligned(shape, offset=1),
        "token stride": torch.randn(2, KV_HEADS, 300, HEAD_DIM + 8).to(torch.bfloat16)[..., :HEAD_DIM],
        "dim stride": torch.randn(2, KV_HEADS, HEAD_DIM, 300).to(torch.bfloat16).transpose(2, 3),
    }


@by_any_way
@pytest.mark.parametrize("fault", unfit())
def test_tensors_that_do_not_fit_are_copied_or_refused(
    files: PackageFiles,
    backend: str,
    driver: Driver,
    standin: Standin,
    fault: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, _, v = tensors(2, 300)
    k = unfit()[fault]
    strict = kernels(files, backend, driver)
    with pytest.raises(PatchError, match=r"attention: k: expected an address that is a multiple of 16"):
        strict.attend(0, q, k, v, None, None, 1.0, None)

    copies: list[torch.Tensor] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda *args, **options: copies.append(clone(*args, **options)) or copies[-1]
    )
    lenient = kernels(files, backend, driver, strict=False)
    standin.log()
    lenient.attend(0, q, k, v, None, None, 1.0, None)
    lenient.attend(0, q, k, v, None, None, 1.0, None)
    copy = copies[0]
    assert torch.equal(copy, k)
    found = arguments(entry_of(files, backend), launches(standin)[0])
    assert found["k"] == copy.data_ptr()
    assert found["k"] % 16 == 0
    assert found["k_token_stride"] == HEAD_DIM
    assert len(caplog.records) == 1
    assert "attention: k is copied at every call" in caplog.text


@by_any_way
def test_the_stride_of_an_axis_of_one_does_not_matter(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = tensors(2, 300, batch=1)
    odd = k.as_strided(k.shape, (7, *k.stride()[1:]))
    gpu.attend(0, q, odd, v, None, None, 1.0, None)
    found = arguments(entry_of(files, backend), launches(standin)[0])
    assert (found["k"], found["k_batch_stride"]) == (k.data_ptr(), 0)


@by_any_way
def test_nothing_is_launched_for_nothing(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    assert gpu.attend(0, *tensors(0, 300), None, None, 1.0, None).shape == (2, 0, HEADS, HEAD_DIM)
    assert gpu.attend(0, *tensors(5, 300, batch=0), None, None, 1.0, None).shape == (0, 5, HEADS, HEAD_DIM)
    assert standin.log() == []


@by_any_way
def test_fewer_keys_than_queries(files: PackageFiles, backend: str, driver: Driver) -> None:
    with pytest.raises(TopologyError, match=r"expected at most 3 queries, as keys, got 5"):
        kernels(files, backend, driver).attend(0, *tensors(5, 3), None, None, 1.0, None)


@by_any_way
def test_a_part_of_the_heads_is_refused(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = tensors(2, 300)
    kv_heads = k.shape[1]
    with pytest.raises(TargetError, match=rf"expected all {kv_heads} KV heads of the layer.*got those from 1 to 1"):
        gpu.attend(0, q[:, : HEADS // kv_heads], k[:, 1:2], v[:, 1:2], None, None, 1.0, None, first_kv_head=1)
    assert standin.log() == []


@by_any_way
def test_rows_that_the_topology_refuses(backend: str, driver: Driver, standin: Standin, tmp_path: Path) -> None:
    out = compile_package(topology("error"), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"])
    gpu = kernels(read_package(out), backend, driver)
    limit = 8 * BLOCK
    with pytest.raises(TopologyError, match=rf"expected at most {limit} tokens.*got {limit + 1}"):
        gpu.attend(0, *tensors(4, limit + 1), None, None, 1.0, None)
    left = gpu.attend(0, *tensors(4, limit + 1), torch.tensor([9, 9]), None, 1.0, None)
    assert left.isnan().all()  # the kernel, which does not run here, fills in what the topology covers


# What the launcher refuses to load


def changed(files: PackageFiles, backend: str, change: Callable[[KernelEntry], KernelEntry]) -> PackageFiles:
    entries = tuple(
        change(kernel) if kernel.target == TARGETS[backend] else kernel for kernel in files.manifest.kernels
    )
    return dataclasses.replace(files, manifest=dataclasses.replace(files.manifest, kernels=entries))


def with_launch(**fields: Any) -> Callable[[KernelEntry], KernelEntry]:
    def change(entry: KernelEntry) -> KernelEntry:
        assert entry.launch is not None
        return dataclasses.replace(entry, launch=dataclasses.replace(entry.launch, **fields))

    return change


def with_arguments(*arguments: Argument) -> Callable[[KernelEntry], KernelEntry]:
    return lambda entry: dataclasses.replace(entry, arguments=arguments)


REFUSED = {
    "an unknown argument": (with_arguments(Argument("secret", "pointer")), r"arguments: .*got secret pointer"),
    "another type": (with_arguments(Argument("num_queries", "i64")), r"arguments: .*got num_queries i64"),
    "a struct": (with_arguments(Argument("q", "struct")), r"arguments: .*got q struct"),
    "a precondition": (
        lambda entry: dataclasses.replace(entry, preconditions=("q % 64 == 0",)),
        r"preconditions: expected conditions that the launcher checks, got 'q % 64 == 0'",
    ),
    "no launch": (lambda entry: dataclasses.replace(entry, launch=None), r"launch: expected a grid.*got none"),
    "two axes": (with_launch(grid=("batch", "one")), r"launch: expected a grid of three axes"),
    "an unknown axis": (with_launch(grid=("batch", "one", "pages")), r"launch: expected a grid of three axes"),
    "no rows": (with_launch(tile_rows=0), r"launch: expected threads, rows and bytes that can be"),
    "too many threads": (with_launch(threads=2048), r"launch: expected threads, rows and bytes that can be"),
    "scratch": (lambda entry: dataclasses.replace(entry, scratch_bytes=64), r"scratch_bytes: expected 0, got 64"),
    "a phase": (
        lambda entry: dataclasses.replace(entry, phase="sample"),
        r"phase: expected one of prefill, decode, reduce, got 'sample'",
    ),
    "heads of a decoding kernel": (
        lambda entry: dataclasses.replace(entry, heads=(0, 4), phase="decode"),
        r"heads: expected none for the phase decode, got \(0, 4\)",
    ),
    "a dtype": (lambda entry: dataclasses.replace(entry, dtype="fp8"), r"dtype: expected one of bf16, fp16, got 'fp8'"),
}


@by_any_way
@pytest.mark.parametrize("name", REFUSED)
def test_an_interface_that_the_launcher_does_not_know(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, name: str
) -> None:
    change, message = REFUSED[name]
    standin.log()
    with pytest.raises(PackageError, match=message):
        kernels(changed(files, backend, change), backend, driver)
    assert standin.log() == []


def test_the_launcher_knows_all_that_the_compiler_uses() -> None:
    assert {phase for phase, _ in INTERFACES} == set(PHASES)
    for interface in INTERFACES.values():
        assert {argument.name: argument.type for argument in interface.arguments}.items() <= ARGUMENT_TYPES.items()
        assert set(interface.preconditions) <= PRECONDITIONS
        assert set(interface.grid) <= set(GRID_AXES)


def tables(files: PackageFiles) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load(files.files["tables.safetensors"])
    return found


def with_tables(files: PackageFiles, changes: dict[str, torch.Tensor | None]) -> PackageFiles:
    left = {name: tensor for name, tensor in (tables(files) | changes).items() if tensor is not None}
    return dataclasses.replace(files, files=dict(files.files) | {"tables.safetensors": safetensors.torch.save(left)})


@by_any_way
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("rows", lambda _table: None, r"attention_000.decode.rows: expected an int32 matrix, got none"),
        ("rows", lambda table: table.long(), r"attention_000.decode.rows: expected an int32 matrix"),
        ("rows", lambda table: table[:1], r"attention_000.decode.rows: expected 2 heads, got 1"),
        ("rows", lambda table: table + 1, r"attention_000.decode: expected plans and segments that exist"),
        ("rows", lambda table: table - 1, r"attention_000.decode: expected plans and segments that exist"),
        ("plans", lambda table: table + 1, r"attention_000.decode: expected plans and segments that exist"),
        ("plans", lambda table: table[:, :1].contiguous(), r"attention_000.decode.plans: expected 3 columns, got 1"),
        ("segments", lambda table: table.flatten(), r"attention_000.decode.segments: expected an int32 matrix"),
    ],
)
def test_a_table_that_points_elsewhere(
    files: PackageFiles,
    backend: str,
    driver: Driver,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
) -> None:
    name = f"attention_000.decode.{part}"
    with pytest.raises(PackageError, match=message):
        kernels(with_tables(files, {name: change(tables(files)[name])}), backend, driver)


@by_any_way
def test_no_tables(files: PackageFiles, backend: str, driver: Driver) -> None:
    without = {name: data for name, data in files.files.items() if name != "tables.safetensors"}
    with pytest.raises(PackageError, match=r"tables.safetensors: expected tables of segments"):
        kernels(dataclasses.replace(files, files=without), backend, driver)
    damaged = dict(files.files) | {"tables.safetensors": b"no tensors"}
    with pytest.raises(PackageError, match=r"tables.safetensors: expected tables of segments"):
        kernels(dataclasses.replace(files, files=damaged), backend, driver)


def test_code_that_the_driver_does_not_take(files: PackageFiles, backend: str, driver: Driver) -> None:
    path = entry_of(files, backend).file
    damaged = dataclasses.replace(files, files=dict(files.files) | {path: b"no code at all, though long enough " * 4})
    with pytest.raises(
        PackageError, match=r"expected code that the driver loads, got .*ERROR_INVALID_IMAGE.*; compile"
    ):
        kernels(damaged, backend, driver)


def test_a_kernel_that_is_not_in_the_code(files: PackageFiles, backend: str, driver: Driver) -> None:
    renamed = changed(files, backend, lambda entry: dataclasses.replace(entry, symbol="elsewhere"))
    with pytest.raises(PackageError, match=r": elsewhere: expected code that the driver loads, got .*ERROR_NOT_FOUND"):
        kernels(renamed, backend, driver)


def test_a_launch_that_the_driver_refuses(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    call = LAUNCHES[way]
    standin.fail(call, 1)
    with pytest.raises(TargetError, match=r"launch of attention_000: expected a launch, got .*ERROR_INVALID_VALUE"):
        gpu.attend(0, *tensors(2, 300), None, None, 1.0, None)
    standin.fail(call, 0)


def test_a_device_that_is_not_there(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    call = {"cuda": "cuDevicePrimaryCtxRetain", "hip": "hipSetDevice"}[backend]
    standin.fail(call, 101)
    with pytest.raises(
        TargetError, match=rf"{backend}:7: expected a device that the driver opens, got .*ERROR_INVALID_D"
    ):
        kernels(files, backend, driver, device=7)
    standin.fail(call, 0)


# From the package's side


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=132))


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_call_goes_where_its_tensors_are(folder: Path, backend: str, standin: Standin) -> None:
    package = load(folder, strict=True, device="cuda")
    assert package.dtypes_on("cuda:0") == (torch.bfloat16,)
    assert [call for call in standin.log() if call["call"] in LOADS.values()]
    q, k, v = tensors(5, 300)
    out = package.run(0, on_gpu(q), on_gpu(k), on_gpu(v), None, None, 1.0)
    assert isinstance(out, OnGpu)
    assert len(launches(standin)) == 1
    assert not package.attention(0, q, k, v).any()
    assert launches(standin) == []


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_first_call_loads_what_it_needs(folder: Path, backend: str, standin: Standin) -> None:
    package = load(folder)
    assert standin.log() == []
    q, k, v = map(on_gpu, tensors(5, 300))
    package.run(0, q, k, v, None, None, 1.0)
    assert len(launches(standin)) == 1


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_package_without_cpu_kernels_is_loaded_for_the_gpu(backend: str, standin: Standin, tmp_path: Path) -> None:
    out = compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"])
    package = load(out, strict=True)
    q, k, v = map(on_gpu, tensors(5, 300))
    package.run(0, q, k, v, None, None, 1.0)
    assert len(launches(standin)) == 1
    with pytest.raises(TargetError, match=r"expected kernels for cpu, got only cuda:90"):
        package.attention(0, *tensors(5, 300))


@by_any_way
@pytest.mark.usefixtures("fake_gpu", "standin")
def test_a_dtype_without_gpu_kernels(folder: Path, backend: str) -> None:
    q, k, v = (on_gpu(tensor.float()) for tensor in tensors(5, 300))
    with pytest.raises(PatchError, match=r"attention: q: expected one of torch.bfloat16, got torch.float32"):
        load(folder).run(0, q, k, v, None, None, 1.0)


def test_a_gpu_where_there_is_none(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TargetError, match=r"cuda: expected a GPU that torch can use, got none"):
        load(folder, device="cuda")


def test_a_device_of_another_kind(folder: Path) -> None:
    package = load(folder)
    q, k, v = (tensor.to("meta") for tensor in tensors(5, 300))
    with pytest.raises(TargetError, match=r"expected tensors on the CPU or a GPU, got meta"):
        package.run(0, q, k, v, None, None, 1.0)


@pytest.mark.parametrize(
    ("packaged", "own", "chosen"),
    [
        (["cpu", "cuda:80", "cuda:90"], "cuda:90", "cuda:90"),
        (["cuda:80", "cuda:86", "cuda:89"], "cuda:86", "cuda:86"),
        (["cuda:80", "cuda:86"], "cuda:89", "cuda:86"),
        (["cuda:86", "cuda:89"], "cuda:80", None),
        (["cuda:80"], "cuda:90", None),
        (["cuda:100"], "cuda:103", None),
        (["hip:gfx942"], "hip:gfx942", "hip:gfx942"),
        (["hip:gfx90a"], "hip:gfx942", None),
        (["cpu"], "cuda:90", None),
    ],
)
def test_which_code_a_device_runs(files: PackageFiles, packaged: list[str], own: str, chosen: str | None) -> None:
    entries = tuple(dataclasses.replace(files.manifest.kernels[0], target=target) for target in packaged)
    manifest = dataclasses.replace(files.manifest, kernels=entries)
    if chosen is not None:
        assert str(choose_target(manifest, Target.parse(own), "here")) == chosen
        return
    message = (
        rf"here: expected kernels for {own}, this device's target, got only {', '.join(packaged)}; .*--target {own}"
    )
    with pytest.raises(TargetError, match=message):
        choose_target(manifest, Target.parse(own), "here")


def test_the_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (12, 0))
    assert target_of(torch.device("cuda", 0)) == Target("cuda", "120")

    properties = SimpleNamespace(gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert target_of(torch.device("cuda", 0)) == Target("hip", "gfx90a")


# In a process that starts as a serving machine does: no Triton, the driver found by its name


SERVING = """
import ctypes, json, sys, time, types
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jinja2", "networkx", "triton", *sys.argv[2:]) or name.startswith("surgeon.compiler"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Missing())
import torch
from gpu_standin import FakeStream, on_gpu
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
torch.Tensor.cuda = lambda tensor, device: tensor
torch.cuda.current_stream = lambda device: FakeStream(77)
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
from surgeon.runtime import load
begin = time.perf_counter()
package = load(sys.argv[1], strict=True, device="cuda")
print(f"loaded in {time.perf_counter() - begin:.3f} s", file=sys.stderr)
q = torch.zeros((1, 4, 200, 128), dtype=torch.bfloat16)
k, v = torch.zeros((2, 1, 2, 200, 128), dtype=torch.bfloat16)
package.run(0, on_gpu(q), on_gpu(k), on_gpu(v), None, None, 0.5)
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
library = ctypes.CDLL("libcuda.so.1")
library.standin_log.restype = ctypes.c_char_p
launch = json.loads(library.standin_log().decode().splitlines()[-1])
print(json.dumps({"driver": package._on(torch.device("cuda", 0)).driver, "q": q.data_ptr(), "launch": launch}))
"""


@pytest.mark.parametrize("way", ["cuda.core", "ctypes on libcuda.so.1"])
def test_a_serving_machine_needs_no_triton(folder: Path, files: PackageFiles, standin_folder: Path, way: str) -> None:
    if way == "cuda.core":
        pytest.importorskip("cuda.core")
    done = subprocess.run(
        [sys.executable, "-c", SERVING, str(folder), *([] if way == "cuda.core" else ["cuda"])],
        env=os.environ | {"LD_LIBRARY_PATH": str(standin_folder), "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=standin_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["driver"] == way
    assert found["launch"]["stream"] == 77
    values = arguments(entry_of(files, "cuda"), found["launch"])
    assert (values["q"], values["num_queries"], values["scale"]) == (found["q"], 200, 0.5)


def test_no_driver_is_a_target_error() -> None:
    script = (
        "import ctypes, sys\n"
        "from surgeon.runtime.drivers import open_driver\n"
        "from surgeon.runtime.errors import TargetError\n"
        "def missing(name, *more, **options): raise OSError(f'{name}: no such file')\n"
        "ctypes.CDLL = missing\n"
        "try: open_driver('hip')\n"
        "except TargetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.startswith("hip: expected the driver libamdhip64.so, got libamdhip64.so: no such file; install")
