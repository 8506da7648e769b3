"""Packages for tests of their readers: written by the compiler, with kernels that no processor could run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from surgeon.compiler.kernels.backend import BACKENDS
from surgeon.compiler.kernels.cpu.variants import X86_64
from surgeon.compiler.package.write import write_package
from surgeon.compiler.schedule.liveness import liveness_tables
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import Binary, CpuSource, SourceFile
from surgeon.compiler.specs.kernel_spec import KernelSpec
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.interface import INTERFACES
from surgeon.runtime.package.manifest import DIRECT_LIBRARY, KernelEntry, Launch, Tool
from surgeon.runtime.package.target import Target

CODE = b"\x7fELF, and nothing more"


def write(folder: Path, topology: Topology, targets: Sequence[str] = ("cpu",), direct: bool = False) -> Path:
    """Writes a package with every dtype of every target: a library for a CPU, prefill kernels by schedule for a GPU.

    With `direct`, it also has the library of the direct op.
    """
    layers = schedule_layers(topology)
    sources, binaries = [], []
    for target in map(Target.parse, targets):
        specs = BACKENDS[target.backend].specialize(topology, layers, target, None, None, liveness_tables(layers))
        on_cpu = target.backend == "cpu"
        files = tuple(SourceFile(f"cpu/{variant.name}.cpp", "") for variant in X86_64) if on_cpu else ()
        sources.append(CpuSource(target, specs, files, {}))  # only its files are used here
        binaries += [_library(specs)] if on_cpu else [_code(spec, d) for spec in specs for d in spec.dtypes]
    if direct:
        binaries.append(Binary(DIRECT_LIBRARY, CODE, (), ()))
    return write_package(folder, topology, liveness_tables(layers), sources, binaries)


def replace_file(folder: Path, path: str, data: bytes) -> None:
    """Puts other bytes into a package and adapts the manifest."""
    (folder / path).write_bytes(data)
    root = json.loads((folder / "manifest.json").read_text())
    for entry in root["files"]:
        if entry["path"] == path:
            entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(root))


def _library(specs: Sequence[KernelSpec]) -> Binary:
    path = "cpu/attention.so"
    entries = tuple(
        KernelEntry("cpu", dtype, spec.layers, spec.name, path, f"surgeon_{spec.name}", (), None, ())
        for spec in specs
        for dtype in spec.dtypes
    )
    return Binary(path, CODE, entries, (Tool("g++", "g++ (Debian) 12"),))


def _code(spec: KernelSpec, dtype: str) -> Binary:
    path, interface = f"{spec.target.folder}/{spec.name}.{dtype}.bin", INTERFACES["prefill", False]
    launch = Launch(interface.grid, 64, 128, 0)
    entry = KernelEntry(
        str(spec.target), dtype, spec.layers, spec.name, path, spec.name, interface.arguments, launch, (), "prefill"
    )
    return Binary(path, CODE, (entry,), (Tool("triton", "3.9.0"),))
