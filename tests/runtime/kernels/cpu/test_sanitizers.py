"""The CPU kernels under the address and undefined-behaviour sanitizers, which see what right results may hide."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from surgeon.compiler import compile_package
from surgeon.compiler.kernels import backend
from surgeon.compiler.kernels.cpu.build import find_compiler
from surgeon.compiler.kernels.cpu.variants import PORTABLE, variants_for
from surgeon.compiler.topology.router import Router
from tile_units import UNITS
from topologies import build, random_topology, window_head

HELPERS = Path(__file__).parents[3] / "helpers"
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
SANITIZED = {"ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def sanitizer_library() -> Path:
    """The address sanitizer's library, to be loaded before everything else."""
    command = find_compiler(None).command
    named = subprocess.run([command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    library = Path(named.stdout.strip())
    if not library.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    return library


@pytest.fixture
def sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Makes $CXX a compiler that builds with the sanitizers; returns what a process that loads its work needs."""
    environment = SANITIZED | {"LD_PRELOAD": str(sanitizer_library())}
    real, command = find_compiler(None), tmp_path / "sanitizing-g++"
    command.write_text(  # the version keeps its objects apart from others in the cache
        f'#!/bin/sh\nunset LD_PRELOAD\n[ "$1" = --version ] && echo "sanitizing {real.version}, {FLAGS}" && exit\n'
        f'exec {real.command} "$@" {FLAGS}\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.mark.slow
def test_no_call_touches_what_it_must_not(
    sanitizers: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = [variant for variant in variants_for(platform.machine()) if variant.name in ("x86_64_v3", "portable")]
    variants = (replace(UNITS["emulated"], rest=PORTABLE), *plain)
    monkeypatch.setattr(backend, "variants_for", lambda _machine: variants)
    topology = random_topology(
        np.random.default_rng(3),
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=80,  # no multiple of every vector's and tile's width
        block_size=16,
        num_blocks=9,
    )
    routed = build([[window_head(0, 1, route=2), *[window_head(1, 1)] * 5]], num_kv_heads=2, head_dim=80, block_size=16)
    assert routed.router is not None
    router = Router((None, *routed.router.layers))
    topology = replace(topology, layers=(topology.layers[0], *routed.layers), router=router)
    folder = compile_package(topology, tmp_path / "kernels", dtypes=["fp32", "bf16"])
    script = Path(__file__).with_name("sanitizer_process.py")
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | sanitizers | {"PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "2"},
        cwd=HELPERS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert int(result.stdout.split()[0]) > 200
