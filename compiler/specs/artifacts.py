"""The products of the last stages: rendered sources and compiled binaries."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import cast

from surgeon.compiler.specs.kernel_spec import CpuSpec, GpuSpec
from surgeon.compiler.specs.tiles import Tile
from surgeon.runtime.package.interface import Interface, interfaces_of
from surgeon.runtime.package.manifest import KernelEntry, Tool, from_plain
from surgeon.runtime.package.segment_table import SegmentTable
from surgeon.runtime.package.target import Target


@dataclass(frozen=True)
class SourceFile:
    """A rendered file; `path` is its path in the package, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class CpuSource:
    """The rendered source of a CPU library.

    `flags` holds the extra compiler flags of a file, beyond those for all files, by the file's path.
    """

    target: Target
    specs: tuple[CpuSpec, ...]
    files: tuple[SourceFile, ...]
    flags: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class GpuSource:
    """The rendered source of one GPU kernel, which may serve several schedules.

    `phase` is that of its entries in the manifest. Its one file is named after its function, `tile` is its tiling, and
    `heads` are the first and the end of the query heads that it is for, empty for all. `tables` are the tables that it
    reads, by their names in the package; `table` is the common part of those names, empty for none.
    """

    target: Target
    specs: tuple[GpuSpec, ...]
    files: tuple[SourceFile, ...]
    phase: str
    tile: Tile
    heads: tuple[int, ...] = ()
    table: str = ""
    tables: Mapping[str, SegmentTable] = field(default_factory=dict)

    @property
    def interface(self) -> Interface:
        """The interface that the kernel is launched by."""
        interface = interfaces_of(self.specs[0].is_routed)[self.phase, bool(self.table)]
        return interface.persistent if self.tile.persistent else interface

    @property
    def fuses(self) -> bool:
        """True if multiplications and additions may be fused: not where bits must be the same everywhere."""
        return self.phase not in ("write_nodes", "choose")


Source = CpuSource | GpuSource


@dataclass(frozen=True)
class Binary:
    """One compiled file of a package, its kernels as the manifest lists them, and the tools that made it.

    `assembly` is the text that a GPU's file was assembled from, PTX or AMD's, which is for people and in no package.
    """

    path: str
    data: bytes
    kernels: tuple[KernelEntry, ...]
    tools: tuple[Tool, ...]
    assembly: str = ""

    def to_bytes(self) -> bytes:
        """Serializes the binary for the cache: one line of JSON, then the file's own bytes."""
        rest = {
            "path": self.path,
            "kernels": list(map(asdict, self.kernels)),
            "tools": list(map(asdict, self.tools)),
            "assembly": self.assembly,
        }
        return json.dumps(rest).encode() + b"\n" + self.data

    @classmethod
    def from_bytes(cls, stored: bytes) -> "Binary":
        """Restores a binary from `to_bytes`."""
        line, _, data = stored.partition(b"\n")
        rest = json.loads(line)
        kernels = from_plain(tuple[KernelEntry, ...], rest["kernels"], "kernels")
        tools = from_plain(tuple[Tool, ...], rest["tools"], "tools")
        listed = cast(tuple[KernelEntry, ...], kernels), cast(tuple[Tool, ...], tools)
        return cls(rest["path"], data, *listed, rest["assembly"])
