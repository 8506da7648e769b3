"""Packages of bf16 kernels on a matrix unit: the processor's own, or a plain C++ one that runs anywhere."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from surgeon.compiler import Topology, compile_package
from surgeon.compiler.kernels import backend
from surgeon.compiler.kernels.cpu.variants import PORTABLE, X86_64, TileVariant, Variant
from surgeon.runtime import Package, load

# What runs besides prefill is tested elsewhere, so it need not be fast; at -O3 the emulated unit takes long to compile.
_REST = replace(PORTABLE, flags=("-O0",))
UNITS: dict[str, TileVariant] = {"emulated": TileVariant("emulated", ("-O1",), _REST, "emulated")} | {
    variant.name: replace(variant, rest=replace(variant.rest, flags=(*variant.rest.flags, "-O0")))
    for variant in X86_64
    if isinstance(variant, TileVariant)
}
"""The units by the names of their variants."""


def load_on_tiles(unit: str, topology: Topology, folder: Path) -> Package:
    """The topology's bf16 package with one unit's variant and what it needs besides, compiled once a folder.

    Skips the test where the processor has no such unit.
    """
    if unit != "emulated" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this processor does not run {unit}")
    variants: tuple[Variant | TileVariant, ...] = (UNITS[unit], UNITS[unit].rest)
    if not folder.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "variants_for", lambda _machine: variants)
            compile_package(topology, folder, dtypes=("bf16",))
    if unit not in load(folder).cpu_variants:
        pytest.skip(f"this processor does not run {unit}")
    return load(folder, strict=True, cpu_variant=unit)
