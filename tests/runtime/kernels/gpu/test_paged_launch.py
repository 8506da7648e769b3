"""Batches over pages: what the launcher launches for them, on a stand-in for a driver, and what it refuses."""

import dataclasses
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
    topology,
)
from gpu_standin import Standin, on_gpu
from no_waiting import NoWaiting
from surgeon.compiler import compile_package
from surgeon.runtime import load
from surgeon.runtime.errors import PackageError, PatchError, TargetError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.kernels import GpuKernels
from surgeon.runtime.kernels.gpu.load import paged_dtypes
from surgeon.runtime.package import interface
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.target import Target
from surgeon.runtime.packed_batch import NO_DENSE_ROWS, DeviceBatch

pytest.importorskip("triton")

PAGE = 2 * BLOCK
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="session")
def paged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for both vendors' GPUs with kernels for pages."""
    out = tmp_path_factory.mktemp("paged") / "kernels"
    return compile_package(topology(), out, ["cpu", *TARGETS.values()], dtypes=["bf16"], paged=True)


@pytest.fixture(scope="session")
def paged_files(paged_folder: Path) -> PackageFiles:
    return read_package(paged_folder)


def batch(queries: list[int], lengths: list[int]) -> DeviceBatch:
    """Sequences with these numbers of queries and tokens, in a block table that is wider than its rows are apart."""
    table = torch.arange(len(lengths) * 8, dtype=torch.int32).view(-1, 8)[:, :5]
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    dense_from = torch.full((len(lengths),), NO_DENSE_ROWS, dtype=torch.int32)
    return DeviceBatch(starts, torch.tensor(lengths, dtype=torch.int32), dense_from, table, PAGE, max(queries))


def operands(tokens: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Tensors:
    """q as a part of a projection's rows, keys and values as the halves of a cache's rows, and the output."""
    q = torch.zeros((tokens, 2 * heads, HEAD_DIM), dtype=torch.bfloat16)[:, :heads]
    k, v = torch.zeros((9, kv_heads, PAGE, 2 * HEAD_DIM), dtype=torch.bfloat16).split(HEAD_DIM, dim=3)
    return q, k, v, torch.zeros((tokens, heads, HEAD_DIM), dtype=torch.bfloat16)


def attend(gpu: GpuKernels, step: DeviceBatch, given: Tensors, first_kv_head: int = 0) -> None:
    q, k, v, out = given
    gpu.attend_pages(1, step, q, k, v, 0.125, out, first_kv_head)


def common(step: DeviceBatch, given: Tensors) -> dict[str, int | float]:
    """The arguments that kernels of attention get alike."""
    q, k, v, _ = given
    return {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "query_start": step.query_start.data_ptr(),
        "lengths": step.lengths.data_ptr(),
        "dense_from": step.dense_from.data_ptr(),
        "block_table": step.block_table.data_ptr(),
        "q_token_stride": 2 * HEADS * HEAD_DIM,
        "q_head_stride": HEAD_DIM,
        "page_stride": KV_HEADS * PAGE * 2 * HEAD_DIM,
        "page_head_stride": PAGE * 2 * HEAD_DIM,
        "page_token_stride": 2 * HEAD_DIM,
        "block_table_stride": 8,
        "page_shift": 8,
        "first_kv_head": 0,
        "scale": 0.125,
        "global_scratch": 0,
        "profile_scratch": 0,
    }


def test_a_step_of_prompts_and_decoding(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(paged_files, backend, driver)
    step, given = batch([150, 1, 1], [400, 700, 3]), operands(152)
    standin.log()
    attend(gpu, step, given)
    decode, combine, prefill = launches(standin)
    assert {each["stream"] for each in (decode, combine, prefill)} == {STREAM}
    found = arguments(entry_of(paged_files, backend, "paged_prefill"), prefill)
    assert found == common(step, given) | {"out": given[3].data_ptr(), "num_kv_heads": KV_HEADS}
    geometry = entry_of(paged_files, backend, "paged_prefill").launch
    assert geometry is not None
    assert prefill["grid"] == [HEADS, 3, -(-150 // geometry.tile_rows) + 1]

    splits = 2 * PROCESSORS // (3 * KV_HEADS)
    assert decode["grid"] == [KV_HEADS, 3, splits]
    first = arguments(entry_of(paged_files, backend, "paged_decode"), decode)
    assert {name: first[name] for name in common(step, given)} == common(step, given)
    assert combine["grid"] == [HEADS, 3, 1]
    second = arguments(entry_of(paged_files, backend, "paged_combine"), combine)
    assert second == {
        "partial": first["partial"],
        "partial_lse": first["partial_lse"],
        "out": given[3].data_ptr(),
        "query_start": step.query_start.data_ptr(),
        "num_splits": splits,
        "global_scratch": 0,
        "profile_scratch": 0,
    }


@by_any_way
def test_a_step_of_decoding_has_grids_that_follow_from_its_sequences_alone(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(paged_files, backend, driver)
    standin.log()
    grids = []
    for lengths in ([1, 2], [100_000, 7]):
        attend(gpu, batch([1, 1], lengths), operands(2))
        grids.append([launch["grid"] for launch in launches(standin)])
    assert grids[0] == grids[1] == [[KV_HEADS, 2, PROCESSORS // KV_HEADS], [HEADS, 2, 1]]


@by_any_way
def test_many_sequences_have_one_split_each(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(paged_files, backend, driver)
    standin.log()
    attend(gpu, batch([1] * 100, [300] * 100), operands(100))
    assert [launch["grid"] for launch in launches(standin)] == [[KV_HEADS, 100, 1], [HEADS, 100, 1]]


@by_any_way
def test_a_part_of_the_kv_heads_says_which(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(paged_files, backend, driver)
    standin.log()
    attend(gpu, batch([5], [300]), operands(5, HEADS // 2, 1), first_kv_head=1)
    _, _, prefill = launches(standin)
    assert prefill["grid"][:2] == [HEADS // KV_HEADS, 1]
    found = arguments(entry_of(paged_files, backend, "paged_prefill"), prefill)
    assert (found["first_kv_head"], found["num_kv_heads"], found["page_stride"]) == (1, 1, PAGE * 2 * HEAD_DIM)


@by_any_way
@pytest.mark.parametrize("queries", [[1, 1], [30, 1]])
def test_a_step_never_waits_for_the_device(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin, queries: list[int]
) -> None:
    gpu = kernels(paged_files, backend, driver)
    step, given = batch(queries, [50, 60]), operands(sum(queries))
    standin.log()
    with NoWaiting():
        attend(gpu, step, given)
    assert launches(standin)


@by_any_way
def test_schedules_in_tables(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0)
    out = compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"], paged=True)
    files = read_package(out)
    gpu = kernels(files, backend, driver)
    standin.log()
    attend(gpu, batch([5], [300]), operands(5))
    decode, _, prefill = launches(standin)
    tables = [
        arguments(entry_of(files, backend, phase), launch)["table_rows"]
        for phase, launch in (("paged_decode", decode), ("paged_prefill", prefill))
    ]
    assert len(set(tables)) == 2


@by_any_way
def test_ordinary_calls_run_on_the_same_package(
    paged_files: PackageFiles, files: PackageFiles, backend: str, driver: Driver
) -> None:
    assert {entry for entry in files.manifest.kernels if entry.target == TARGETS[backend]} < set(
        paged_files.manifest.kernels
    )
    assert kernels(paged_files, backend, driver).dtypes == (torch.bfloat16,)


@by_any_way
def test_nothing_is_launched_for_nothing(
    paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(paged_files, backend, driver)
    standin.log()
    attend(gpu, batch([0, 0], [3, 4]), operands(0))
    assert standin.log() == []


@by_any_way
def test_a_package_without_kernels_for_pages(files: PackageFiles, backend: str, driver: Driver) -> None:
    assert paged_dtypes(files.manifest, Target.parse(TARGETS[backend])) == ()
    with pytest.raises(TargetError, match=r"expected kernels for keys and values in pages, got none for .*--paged"):
        attend(kernels(files, backend, driver), batch([5], [300]), operands(5))


def test_a_package_says_what_pages_it_has_kernels_for(paged_files: PackageFiles) -> None:
    assert paged_dtypes(paged_files.manifest, Target.parse("cuda:90")) == (torch.bfloat16,)
    assert paged_dtypes(paged_files.manifest, Target.parse("cuda:80")) == ()


@by_any_way
def test_a_runtime_from_before_there_were_such_kernels_refuses_them(
    paged_files: PackageFiles, backend: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "PAGED_INTERFACES", {})
    with pytest.raises(PackageError, match="phase: expected one of prefill, decode, combine, got 'paged_"):
        kernels(paged_files, backend, driver)


@by_any_way
def test_unaligned_pages_are_refused(paged_files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    q, _, v, out = operands(5)
    k = torch.zeros((9, KV_HEADS, PAGE, HEAD_DIM + 8), dtype=torch.bfloat16)[..., :HEAD_DIM]
    for strict in (False, True):
        gpu = kernels(paged_files, backend, driver, strict=strict)
        with pytest.raises(PatchError, match="attention: k: expected an address that is a multiple of 16"):
            attend(gpu, batch([5], [300]), (q, k, v, out))


@by_any_way
def test_rows_that_the_topology_refuses_are_nan(backend: str, driver: Driver, tmp_path: Path) -> None:
    out = compile_package(topology("error"), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"], paged=True)
    given = operands(5)
    attend(kernels(read_package(out), backend, driver), batch([5], [300]), given)
    assert given[3].isnan().all()  # the kernel, which does not run here, fills in covered queries


# Through the package


def placed(step: DeviceBatch) -> DeviceBatch:
    fields = {name: on_gpu(getattr(step, name)) for name in ("query_start", "lengths", "dense_from", "block_table")}
    return dataclasses.replace(step, **fields)


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_batch_runs_on_the_gpu_that_its_tensors_are_on(paged_folder: Path, backend: str, standin: Standin) -> None:
    package = load(paged_folder)
    q, k, v, out = map(on_gpu, operands(5))
    package.kernels.run_pages(0, placed(batch([5], [300])), q, k, v, 0.5, out)
    assert len(launches(standin)) == 3
    q, k, v, out = map(on_gpu, operands(5, HEADS // 2, 1))
    package.part(range(1, 2)).kernels.run_pages(0, placed(batch([5], [300])), q, k, v, 0.5, out)
    assert len(launches(standin)) == 3


def changed(which: int, change: object) -> list[object]:
    given: list[object] = list(operands(5))
    given[which] = change
    return given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(0, torch.zeros(5, HEADS + 1, HEAD_DIM)), rf"attention: q: expected \[0 or more, {HEADS}, "),
        (changed(3, torch.zeros(6, HEADS, HEAD_DIM)), rf"attention: out: expected \[5, {HEADS}, {HEAD_DIM}\], contig"),
        (
            changed(1, torch.zeros(9, KV_HEADS, BLOCK, HEAD_DIM)),
            r"attention: k: expected \[pages, 2, 256, 128\], k and",
        ),
        (changed(2, torch.zeros(8, KV_HEADS, PAGE, HEAD_DIM)), r"attention: v: expected \[pages, 2, 256, 128\], k and"),
        (
            changed(2, torch.zeros(9, KV_HEADS, PAGE, 2 * HEAD_DIM)[..., HEAD_DIM:]),
            r"attention: v: expected torch.bfloat16 on cpu, as q and",
        ),
    ],
)
def test_tensors_that_do_not_fit(paged_folder: Path, given: list[torch.Tensor], message: str) -> None:
    q, k, v, out = given
    with pytest.raises(PatchError, match=message):
        load(paged_folder).kernels.run_pages(0, batch([5], [300]), q, k, v, 1.0, out)


def test_keys_and_values_that_are_laid_out_differently(paged_folder: Path) -> None:
    q, k, _, out = operands(5)
    with pytest.raises(PatchError, match=r"attention: v: expected strides \(131072, 65536, 256, 1\), as k, got"):
        load(paged_folder).kernels.run_pages(0, batch([5], [300]), q, k, k.contiguous(), 1.0, out)


def test_pages_of_less_than_a_block(paged_folder: Path) -> None:
    q, k, v, out = operands(5)
    step = dataclasses.replace(batch([5], [300]), page_tokens=64)
    with pytest.raises(PatchError, match="batch: page_tokens: expected a multiple of the block of 128 tokens, got 64"):
        load(paged_folder).kernels.run_pages(0, step, q, k[:, :, :64], v[:, :, :64], 1.0, out)


def test_a_cpu_has_no_such_calls(folder: Path) -> None:
    q, k, v, out = operands(5)
    with pytest.raises(TargetError, match="expected tensors on a GPU, got cpu"):
        load(folder).kernels.run_pages(0, batch([5], [300]), q, k, v, 1.0, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_start": torch.zeros(2, dtype=torch.int32)},
            r"query_start: expected torch.int32 \[3\], contiguous, on cpu",
        ),
        ({"lengths": torch.zeros(2)}, r"lengths: expected torch.int32 \[2\]"),
        ({"dense_from": torch.zeros(2, dtype=torch.int64)}, r"dense_from: expected torch.int32 \[2\]"),
        ({"dense_from": torch.zeros(2, dtype=torch.int32, device="meta")}, r"dense_from: .* on cpu, got .* on meta"),
        ({"block_table": torch.zeros((1, 5), dtype=torch.int32)}, r"block_table: expected torch.int32 \[2, pages\]"),
        ({"block_table": torch.zeros((5, 2), dtype=torch.int32).T}, r"block_table: expected .* stride 1 last"),
        ({"page_tokens": 48}, r"page_tokens: expected a power of two, got 48"),
    ],
)
def test_batches_that_are_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(PatchError, match=f"batch: {message}"):
        dataclasses.replace(batch([1, 1], [3, 4]), **change)  # type: ignore[arg-type]
