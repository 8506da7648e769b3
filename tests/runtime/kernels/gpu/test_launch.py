"""The launch contract: the kernels that the launcher launches, their arguments and their preconditions."""

import ctypes
from pathlib import Path

import pytest
import torch

from gpu_calls import (
    BLOCK,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PROCESSORS,
    STREAM,
    TARGETS,
    arguments,
    by_any_way,
    entry_of,
    kernels,
    launches,
    second_kv_head,
    tensors,
    topology,
)
from gpu_standin import Standin
from no_waiting import NoWaiting
from surgeon.compiler import compile_package
from surgeon.compiler.kernels.gpu.row_trees import num_leaves
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import decode_table, prefill_table
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.kernels import row_tiles
from surgeon.runtime.operands import PATTERN_ALONE, Operands
from surgeon.runtime.package.interface import INTERFACES
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.segment_table import SegmentTable
from topologies import window_topology

pytest.importorskip("triton")


def test_a_launch_hands_over_every_argument_bit_by_bit(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    q, k, v = tensors(q_length=150, k_length=400)
    position, cache_leftpad = torch.tensor([200, 250]), torch.tensor([0, 7])
    lse = torch.empty((2, HEADS, 150))
    standin.log()
    out = gpu.attend(1, Operands(q, k, v, position, cache_leftpad, 0.125, dense_rows=60, tokens_ahead=7), lse)
    (launch,) = launches(standin)
    assert arguments(entry_of(files, backend), launch) == {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "cache_leftpad": cache_leftpad.data_ptr(),
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
        "dense_tail": 53,
        "first_kv_head": 0,
        "num_kv_heads": KV_HEADS,
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
    gpu.attend(0, Operands(*tensors(3, 300), None, None, 1.0))
    position, cache_leftpad = made
    assert (position.tolist(), cache_leftpad.tolist()) == ([297, 297], [0, 0])
    (launch,) = launches(standin)
    found = arguments(entry_of(files, backend), launch)
    assert (found["position"], found["cache_leftpad"]) == (position.data_ptr(), cache_leftpad.data_ptr())
    assert (found["lse"], found["write_lse"]) == (0, 0)


def test_32_bit_positions_are_widened(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    position = torch.tensor([5, 6], dtype=torch.int32)
    keep: list[torch.Tensor] = []
    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda *args, **options: keep.append(to(*args, **options)) or keep[-1])
        gpu.attend(0, Operands(*tensors(2, 300), position, None, 1.0))
    (launch,) = launches(standin)
    address = arguments(entry_of(files, backend), launch)["position"]
    assert list((ctypes.c_int64 * 2).from_address(int(address))) == [5, 6]


def test_one_query_runs_on_splits_of_the_keys_that_are_then_joined(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = tensors(q_length=1, k_length=700)
    position, cache_leftpad = torch.tensor([600, 650]), torch.tensor([0, 7])
    lse = torch.empty((2, HEADS, 1))
    out = gpu.attend(1, Operands(q, k, v, position, cache_leftpad, 0.125), lse)
    decode, combine = launches(standin)
    splits = 2 * PROCESSORS // (2 * KV_HEADS)
    assert decode["grid"] == [KV_HEADS, 2, splits]
    assert combine["grid"] == [HEADS, 2, 1]
    assert decode["stream"] == combine["stream"] == STREAM
    first = arguments(entry_of(files, backend, "decode"), decode)
    second = arguments(entry_of(files, backend, "combine"), combine)
    assert {name: first[name] for name in ("q", "k", "v", "position", "cache_leftpad", "scale")} == {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "position": position.data_ptr(),
        "cache_leftpad": cache_leftpad.data_ptr(),
        "scale": 0.125,
    }
    assert first["k_head_stride"] == 700 * HEAD_DIM
    assert (first["partial"], first["partial_lse"]) == (second["partial"], second["partial_lse"])
    assert (second["out"], second["lse"], second["write_lse"]) == (out.data_ptr(), lse.data_ptr(), 1)
    assert second["num_splits"] == splits
    table = decode_table(schedule_layers(topology())[1])
    assert_table(first, table)
    assert (first["first_kv_head"], first["dense_tail"]) == (0, PATTERN_ALONE)
    gpu.attend(1, Operands(q, k, v, position, cache_leftpad, 0.125, dense_rows=128))
    decode, _ = launches(standin)
    assert decode["grid"] == [KV_HEADS, 2, splits]  # cut evenly, whatever is visible
    assert arguments(entry_of(files, backend, "decode"), decode)["dense_tail"] == 128


def test_a_part_of_the_kv_heads_says_which_and_gets_a_grid_of_its_own(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = second_kv_head(q_length=150)
    out = gpu.attend(1, Operands(q, k, v, None, None, 1.0), first_kv_head=1)
    (launch,) = launches(standin)
    assert launch["grid"][:2] == [HEADS // KV_HEADS, 2]
    found = arguments(entry_of(files, backend), launch)
    assert [found[name] for name in ("q", "k", "v", "out")] == [tensor.data_ptr() for tensor in (q, k, v, out)]
    assert (found["first_kv_head"], found["num_kv_heads"], found["k_batch_stride"]) == (1, 1, k.stride(0))
    assert out.shape == (2, 150, HEADS // KV_HEADS, HEAD_DIM)

    gpu.attend(1, Operands(*second_kv_head(q_length=1), None, None, 1.0), first_kv_head=1)
    decode, combine = launches(standin)
    splits = 2 * PROCESSORS // 2  # with fewer heads, each has more of the device
    assert decode["grid"] == [1, 2, splits]
    assert combine["grid"] == [HEADS // KV_HEADS, 2, 1]
    found = arguments(entry_of(files, backend, "decode"), decode)
    table = decode_table(schedule_layers(topology())[1])
    rows = (ctypes.c_int32 * table.rows.size).from_address(int(found["table_rows"]))
    assert list(rows) == table.rows.flatten().tolist()  # all heads' rows, of which the kernel takes its own
    assert found["first_kv_head"] == 1
    assert arguments(entry_of(files, backend, "combine"), combine)["num_splits"] == splits


@by_any_way
def test_a_prefill_by_table_gets_the_table_of_its_layer(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0)
    by_table = read_package(compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"]))
    gpu = kernels(by_table, backend, driver)
    standin.log()
    gpu.attend(1, Operands(*tensors(150, 400), None, None, 1.0))
    (launch,) = launches(standin)
    entry = entry_of(by_table, backend)
    assert entry.arguments == INTERFACES["prefill", True].binary_arguments
    assert_table(arguments(entry, launch), prefill_table(schedule_layers(topology())[1], rows=1, blocks=1))


def assert_table(found: dict[str, int | float], table: SegmentTable) -> None:
    """Compares the memory that a launch points to with a table."""
    for name, expected in (("rows", table.rows), ("plans", table.plans), ("segments", table.segments)):
        there = (ctypes.c_int32 * expected.size).from_address(int(found[f"table_{name}"]))
        assert list(there) == expected.flatten().tolist()
    assert found["num_table_rows"] == table.rows.shape[1]


@by_any_way
def test_heads_in_kernels_of_their_own_are_launched_one_after_the_other(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = max(map(num_leaves, schedule_layers(topology())[0].heads))
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", leaves)
    split = read_package(compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"]))
    entries = [entry for entry in split.manifest.kernels if entry.phase == "prefill"]
    assert [entry.heads for entry in entries] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    gpu = kernels(split, backend, driver)
    standin.log()
    out = gpu.attend(1, Operands(*tensors(5, 300), None, None, 1.0))
    found = launches(standin)
    assert [launch["grid"][:2] for launch in found] == [[1, 2]] * 4
    assert len({launch["function"] for launch in found}) == 4
    assert {arguments(entry_of(split, backend), launch)["out"] for launch in found} == {out.data_ptr()}

    gpu.attend(1, Operands(*second_kv_head(q_length=5), None, None, 1.0), first_kv_head=1)
    part = launches(standin)
    assert [launch["function"] for launch in part] == [launch["function"] for launch in found[2:]]
    assert [launch["grid"][:2] for launch in part] == [[1, 2]] * 2


@pytest.mark.parametrize(
    ("tile_rows", "block_size", "dense_tail", "expected"),
    [
        (128, 32, PATTERN_ALONE, 4),
        (128, 32, -32, 4),
        (128, 32, -31, 5),
        (128, 32, 1, 5),
        (128, 128, 1, 4),
        (64, 128, 1, 6),
    ],
)
def test_a_tile_in_which_dense_rows_may_begin_has_one_more_program(
    tile_rows: int, block_size: int, dense_tail: int, expected: int
) -> None:
    assert row_tiles(300, tile_rows, block_size, dense_tail) == expected


@by_any_way
def test_dense_rows_inside_a_tile_get_one_more_program(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path
) -> None:
    topology = window_topology([1, 2], head_dim=HEAD_DIM, block_size=32)
    package = read_package(compile_package(topology, tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"]))
    gpu = kernels(package, backend, driver)
    standin.log()
    q, k, v = (tensor[:, :2] for tensor in tensors(300, 400))
    for dense_rows in (0, 64):
        gpu.attend(0, Operands(q, k, v, None, None, 1.0, dense_rows))
    assert [launch["grid"] for launch in launches(standin)] == [[2, 2, 4], [2, 2, 5]]


@pytest.mark.parametrize(("k_length", "splits"), [(1, 1), (129, 2), (100_000, 6)])
@pytest.mark.parametrize("way", ["cuda"])
def test_short_sequences_are_cut_into_fewer_splits(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, k_length: int, splits: int
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    gpu.attend(0, Operands(*tensors(1, k_length, batch=1), None, None, 1.0))
    assert launches(standin)[0]["grid"] == [KV_HEADS, 1, splits]


@by_any_way
@pytest.mark.parametrize("q_length", [1, 5])
def test_a_launch_never_waits_for_the_device(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, q_length: int
) -> None:
    gpu = kernels(files, backend, driver)
    position, cache_leftpad = torch.tensor([200, 250]), torch.tensor([0, 7])
    standin.log()
    with NoWaiting():
        gpu.attend(1, Operands(*tensors(q_length, 300), position, cache_leftpad, 1.0))
    assert launches(standin)


# Preconditions of the kernels


def misaligned(shape: tuple[int, ...], offset: int) -> torch.Tensor:
    flat = torch.arange(torch.Size(shape).numel() + offset, dtype=torch.float32).to(torch.bfloat16)
    return flat[offset:].view(shape)


def unfit() -> dict[str, torch.Tensor]:
    """Keys that each break one precondition."""
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
        strict.attend(0, Operands(q, k, v, None, None, 1.0))

    copies: list[torch.Tensor] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda *args, **options: copies.append(clone(*args, **options)) or copies[-1]
    )
    lenient = kernels(files, backend, driver, strict=False)
    standin.log()
    lenient.attend(0, Operands(q, k, v, None, None, 1.0))
    lenient.attend(0, Operands(q, k, v, None, None, 1.0))
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
    gpu.attend(0, Operands(q, odd, v, None, None, 1.0))
    found = arguments(entry_of(files, backend), launches(standin)[0])
    assert (found["k"], found["k_batch_stride"]) == (k.data_ptr(), 0)


@by_any_way
def test_nothing_is_launched_for_nothing(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    assert gpu.attend(0, Operands(*tensors(0, 300), None, None, 1.0)).shape == (2, 0, HEADS, HEAD_DIM)
    assert gpu.attend(0, Operands(*tensors(5, 300, batch=0), None, None, 1.0)).shape == (0, 5, HEADS, HEAD_DIM)
    assert standin.log() == []


@by_any_way
def test_fewer_keys_than_queries(files: PackageFiles, backend: str, driver: Driver) -> None:
    with pytest.raises(TopologyError, match=r"expected at most 3 queries, as keys, got 5"):
        kernels(files, backend, driver).attend(0, Operands(*tensors(5, 3), None, None, 1.0))


@by_any_way
def test_rows_that_the_topology_refuses(backend: str, driver: Driver, standin: Standin, tmp_path: Path) -> None:
    out = compile_package(topology("error"), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"])
    gpu = kernels(read_package(out), backend, driver)
    limit = 8 * BLOCK
    with pytest.raises(TopologyError, match=rf"expected at most {limit} tokens.*got {limit + 1}"):
        gpu.attend(0, Operands(*tensors(4, limit + 1), None, None, 1.0))
    left = gpu.attend(0, Operands(*tensors(4, limit + 1), torch.tensor([9, 9]), None, 1.0))
    assert left.isnan().all()  # the kernel, which does not run here, fills in covered queries
