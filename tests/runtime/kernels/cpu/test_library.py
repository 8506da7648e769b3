"""The checks of what a library says about itself before it is called."""

import subprocess
from pathlib import Path

import pytest

from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.cpu.library import CpuLibrary
from surgeon.runtime.package.manifest import CPU_ABI_VERSION

CALL_BYTES = 15 * 8 + 16 * 8 + 8 * 4  # addresses, strides and lengths, the scale and six 32-bit numbers, and padding


def library(folder: Path, **answers: int) -> bytes:
    """A library whose entry points `surgeon_<name>` return these numbers."""
    source, made = folder / "library.c", folder / "library.so"
    source.write_text("\n".join(f"int surgeon_{name}() {{ return {answer}; }}" for name, answer in answers.items()))
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", made], check=True)
    return made.read_bytes()


def refused(data: bytes, text: str) -> None:
    with pytest.raises(PackageError, match=text):
        CpuLibrary(data, "attention.so")


def test_another_size_of_a_call(tmp_path: Path) -> None:
    refused(
        library(tmp_path, abi_version=CPU_ABI_VERSION, call_bytes=CALL_BYTES + 8),
        rf"attention\.so: expected calls of {CALL_BYTES} bytes, got calls of {CALL_BYTES + 8} bytes; compile the",
    )


def test_another_version_is_said_before_what_it_lacks(tmp_path: Path) -> None:
    refused(
        library(tmp_path, abi_version=CPU_ABI_VERSION - 1),
        rf"attention\.so: expected interface version {CPU_ABI_VERSION}, got interface version {CPU_ABI_VERSION - 1}; ",
    )


def test_a_version_that_does_not_say_its_size(tmp_path: Path) -> None:
    refused(library(tmp_path, abi_version=CPU_ABI_VERSION), "expected a library made by surgeon, got one without")


def test_a_library_without_variants_was_asked_for_its_size(tmp_path: Path) -> None:
    refused(
        library(tmp_path, abi_version=CPU_ABI_VERSION, call_bytes=CALL_BYTES),
        "expected a library made by surgeon, got one without its entry points",
    )
