"""Kernels that the launcher refuses to load: with unknown interfaces, or tables that point outside themselves."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from gpu_calls import by_any_way, changed, kernels, with_launch
from gpu_standin import Standin
from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.package.manifest import Argument, KernelEntry
from surgeon.runtime.package.reader import PackageFiles

pytest.importorskip("triton")


def with_arguments(*arguments: Argument) -> Callable[[KernelEntry], KernelEntry]:
    return lambda entry: dataclasses.replace(entry, arguments=arguments)


REFUSED = {
    "an argument": (with_arguments(Argument("secret", "pointer")), r"arguments\[0\]: expected q pointer, got 'secret"),
    "a precondition": (
        lambda entry: dataclasses.replace(entry, preconditions=("q % 64 == 0",)),
        r"preconditions\[0\]: expected",
    ),
    "no launch": (lambda entry: dataclasses.replace(entry, launch=None), r"launch\.grid\[0\]: expected .*, got none"),
    "no rows": (with_launch(tile_rows=0), r"launch: expected numbers of threads, rows and bytes in range"),
    "heads that share a program": (with_launch(program_heads=3), r"program_heads: expected 1, or .* divides 2, got 3"),
    "heads of a decoding program": (
        with_launch("decode", program_heads=2),
        r"program_heads: expected 1, or in a prefill kernel of all heads a number that divides 2, got 2",
    ),
    "persistent programs with another kernel's arguments": (
        with_launch("prefill", grid=("programs", "one", "one")),
        r"arguments\[22\]: expected tasks_taken pointer, got 'global_scratch pointer'",
    ),
    "persistent programs of a decoding kernel": (
        with_launch("decode", grid=("programs", "one", "one")),
        r"launch\.grid\[0\]: expected key_value_heads, got 'programs'",
    ),
    "no heads": (with_launch(program_heads=0), r"program_heads: expected 1, or .* divides 2, got 0"),
    "too much scratch memory": (
        with_launch(scratch_bytes=2**20),
        r"launch: expected numbers of threads, rows and bytes",
    ),
    "too many threads": (with_launch(threads=2048), r"launch: expected numbers of threads, rows and bytes in range"),
    "a phase": (
        lambda entry: dataclasses.replace(entry, phase="sample"),
        r"phase: expected one of prefill, decode, combine, .*, got 'sample'",
    ),
    "heads of a decoding kernel": (
        lambda entry: dataclasses.replace(entry, heads=(0, 4)) if entry.phase == "decode" else entry,
        r"heads: expected none for the phase decode, got \(0, 4\)",
    ),
    "another function": (
        lambda entry: dataclasses.replace(entry, symbol="combine" if entry.phase != "combine" else "decode"),
        r"symbol: expected attention_00\d, in its file for (bf|fp)16, got 'combine in ",
    ),
    "another layer's function": (
        lambda entry: dataclasses.replace(entry, schedule="attention_009"),
        r"symbol: expected attention_009, in its file for (bf|fp)16, got 'attention_00",
    ),
    "another dtype's file": (
        lambda entry: dataclasses.replace(entry, file=entry.file.translate(str.maketrans("bf", "fb"))),
        r"symbol: expected attention_00\d, in its file for (bf|fp)16, got ",
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


def tables(files: PackageFiles) -> dict[str, npt.NDArray[np.int32]]:
    found: dict[str, npt.NDArray[np.int32]] = safetensors.numpy.load(files.files["tables.safetensors"])
    return found


@by_any_way
def test_a_table_that_points_elsewhere(files: PackageFiles, backend: str, driver: Driver) -> None:
    changes = {"attention_000.decode.rows": tables(files)["attention_000.decode.rows"] + 1}
    data = safetensors.numpy.save(tables(files) | changes)
    damaged = dataclasses.replace(files, files=dict(files.files) | {"tables.safetensors": data})
    with pytest.raises(PackageError, match=r"attention_000\.decode\.rows\[0\]: expected numbers of \d plans"):
        kernels(damaged, backend, driver)


@by_any_way
def test_a_table_that_reads_outside_the_keys(files: PackageFiles, backend: str, driver: Driver) -> None:
    segments = tables(files)["attention_000.decode.segments"]
    segments[0, 0] = -1_000_000
    data = safetensors.numpy.save(tables(files) | {"attention_000.decode.segments": segments})
    damaged = dataclasses.replace(files, files=dict(files.files) | {"tables.safetensors": data})
    with pytest.raises(PackageError, match=r"attention_000\.decode\.segments\[0\]: expected ascending units"):
        kernels(damaged, backend, driver)


@by_any_way
@pytest.mark.parametrize("table", ["prefill_1x1", "prefill_2x1", "decode.rows", "attention_000.decode"])
def test_a_table_of_another_kind(files: PackageFiles, backend: str, driver: Driver, table: str) -> None:
    other = changed(
        files, backend, lambda entry: dataclasses.replace(entry, table=table) if entry.phase == "decode" else entry
    )
    with pytest.raises(PackageError, match=rf"table: expected 'decode', got '{table}'; do not use this package"):
        kernels(other, backend, driver)


@by_any_way
def test_no_tables(files: PackageFiles, backend: str, driver: Driver) -> None:
    without = {name: data for name, data in files.files.items() if name != "tables.safetensors"}
    with pytest.raises(PackageError, match=r"tables\.safetensors: expected a safetensors file"):
        kernels(dataclasses.replace(files, files=without), backend, driver)
    damaged = dict(files.files) | {"tables.safetensors": b"no tensors"}
    with pytest.raises(PackageError, match=r"tables\.safetensors: expected a safetensors file"):
        kernels(dataclasses.replace(files, files=damaged), backend, driver)
