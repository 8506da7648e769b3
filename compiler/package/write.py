"""Writes a kernel package: all products, listed in a manifest, put in place in one step.

Source: package format version 1; its reader is `surgeon.runtime.package.reader`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.specs.artifacts import Binary, GpuSource, Source
from surgeon.compiler.specs.kernel_spec import KernelSpec
from surgeon.compiler.system import atomic_files
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.installation import version
from surgeon.runtime.package.manifest import FileEntry, Manifest, Tool
from surgeon.runtime.package.schedule import FILE as SCHEDULES
from surgeon.runtime.package.schedule import PackagedSchedule, origin
from surgeon.runtime.package.segment_table import FILE as TABLES


def check_replaceable(out: Path) -> None:
    """Refuses to replace anything but a package or an empty folder, or a folder that the process is in.

    Raises:
        PackageError: `out` exists and is neither a kernel package nor an empty folder, or holds the current folder.
    """
    atomic_files.check_replaceable(out, "a kernel package", lambda there: (there / "manifest.json").is_file())


def write_package(
    out: Path,
    topology: Topology,
    last_readers: Mapping[LayerSchedule, npt.NDArray[np.int64]],
    sources: Sequence[Source],
    binaries: Sequence[Binary],
) -> Path:
    """Writes the package to a folder beside `out` and renames it into place; the old contents are removed only then.

    Raises:
        PackageError: `out` exists and is not a kernel package.
    """
    check_replaceable(out)
    specs = {spec.name: spec for source in sources for spec in source.specs}
    files = {
        "topology.json": (topology.canonical() + "\n").encode(),
        SCHEDULES: _schedules(topology.sha256, list(specs.values()), last_readers),
    }
    tables = _segment_tables(sources)
    if tables:
        files[TABLES] = safetensors.numpy.save(tables)
    files |= {file.path: file.text.encode() for source in sources for file in source.files}
    files |= {binary.path: binary.data for binary in binaries}
    manifest = Manifest(
        topology_sha256=topology.sha256,
        model=topology.model,
        block_size=topology.block_size,
        num_blocks=topology.num_blocks,
        beyond=topology.beyond,
        layers=topology.covered,
        kernels=tuple(kernel for binary in binaries for kernel in binary.kernels),
        files=tuple(
            FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())
        ),
        routed=tuple(index for index in topology.covered if topology.router and topology.router.layers[index]),
        tools=tuple(
            sorted(
                {Tool("surgeon", version()), *(tool for binary in binaries for tool in binary.tools)},
                key=lambda tool: (tool.name, tool.version),
            )
        ),
    )
    files["manifest.json"] = manifest.to_json().encode()

    atomic_files.write(out, files)
    return out


def _schedules(
    topology_sha256: str, specs: Sequence[KernelSpec], last_readers: Mapping[LayerSchedule, npt.NDArray[np.int64]]
) -> bytes:
    tensors = origin(topology_sha256)
    for spec in specs:
        stored = PackagedSchedule(spec.schedule.heads, last_readers[spec.schedule].astype(np.int32))
        tensors |= stored.tensors(spec.name, spec.layers)
    return safetensors.numpy.save(tensors)


def _segment_tables(sources: Sequence[Source]) -> dict[str, npt.NDArray[np.int32]]:
    """The tables that GPU kernels read of their schedules."""
    tensors: dict[str, npt.NDArray[np.int32]] = {}
    for source in sources:
        if isinstance(source, GpuSource):
            for name, table in source.tables.items():
                tensors |= table.tensors(name)
    return tensors
