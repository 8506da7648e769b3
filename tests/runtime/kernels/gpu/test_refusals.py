"""What the launcher refuses to load: interfaces that it does not know, tables that point elsewhere."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from gpu_calls import by_any_way, changed, kernels
from gpu_standin import Standin
from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.kernels import ARGUMENT_TYPES, GRID_AXES, PHASES, PRECONDITIONS
from surgeon.runtime.package.interface import INTERFACES
from surgeon.runtime.package.manifest import Argument, KernelEntry
from surgeon.runtime.package.reader import PackageFiles

pytest.importorskip("triton")


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
    "no first head": (
        with_arguments(Argument("q", "pointer")),
        r"arguments: expected first_kv_head among them, got none; compile the package with this version",
    ),
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
