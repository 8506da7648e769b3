"""Loads of one package folder while another process compiles into it without a pause."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import topologies
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.package.inspection import PackageReport, inspect
from surgeon.runtime import load
from surgeon.runtime.errors import SurgeonError

COMPILES = """
import itertools, sys
from surgeon.compiler import compile_package, read_topology
out, *files = sys.argv[1:]
for topology in itertools.cycle(map(read_topology, files)):
    compile_package(topology, out, dtypes=("fp32",), jobs=1)
    print("compiled", flush=True)
"""
INSPECTED = 20
"""Every so many loads, the package is also inspected."""


@dataclass
class LoadsFound:
    """Counts of loads, of compiles beside them, and of loads that found another package than the one before."""

    loads: int = 0
    compiles: int = 0
    changes: int = 0
    faults: list[str] = field(default_factory=list)


def load_beside_compiles(folder: Path, times: int) -> LoadsFound:
    """Loads a package `times` times, each of which must give the attention of the one or the other topology."""
    files, answers = [], {}
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 200, 32, generator=generator)
    for window in (1, 2):
        heads, trees = [topologies.head(window=window)], [{"linkage": [[0, 1, 1.0, 2]]}]
        file = folder / f"{window}.json"
        file.write_text(json.dumps(topologies.document([heads], trees, num_blocks=2)))
        package = load(compile_package(read_topology(file), folder / f"of {window}", dtypes=("fp32",)), strict=True)
        answers[package.id] = package.attention(0, q, k, v)
        files.append(file)
    out, log = compile_package(read_topology(files[0]), folder / "kernels", dtypes=("fp32",)), folder / "compiles"
    found, before = LoadsFound(), ""
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-c", COMPILES, str(out), *map(str, files)], stdout=output, env=os.environ
        ) as compiles,
    ):
        try:
            while not log.stat().st_size:
                assert compiles.poll() is None, "the compiles ended before the first was done"
            for number in range(times):
                try:
                    package = load(out, strict=True)
                    if not torch.equal(package.attention(0, q, k, v), answers[package.id]):
                        found.faults.append(f"{package.id} gives other answers")
                    if number % INSPECTED == 0:
                        report = inspect(out)
                        assert isinstance(report, PackageReport)
                        assert f"{report.id}:strict" in answers
                except (SurgeonError, OSError) as error:
                    found.faults.append(f"{type(error).__name__}: {error}")
                found.loads += 1
                found.changes += package.id != before
                before = package.id
            assert compiles.poll() is None, "the compiles ended before the loads"
        finally:
            compiles.terminate()
    found.compiles = len(log.read_text().splitlines())
    return found
