"""What the back half of the pipeline hands from stage to stage: KernelSpec ─▶ Source ─▶ Binary."""

import json
from dataclasses import asdict, dataclass
from typing import cast

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.tiles import TargetTiles, Tile
from surgeon.runtime.package.interface import INTERFACES, Interface
from surgeon.runtime.package.manifest import KernelEntry, Tool, from_plain
from surgeon.runtime.package.target import Target


@dataclass(frozen=True)
class KernelSpec:
    """One attention kernel to make: a distinct layer schedule on one target.

    `name` is unique within the package and names the schedule's tables; `layers` are the model's layers that share it;
    `tiles` are how a GPU's kernels cut their work.
    """

    name: str
    target: Target
    dtypes: tuple[str, ...]
    layers: tuple[int, ...]
    schedule: LayerSchedule
    head_dim: int
    tiles: TargetTiles | None = None

    @property
    def gpu_tiles(self) -> TargetTiles:
        """The tiles of a kernel for a GPU."""
        assert self.tiles is not None
        return self.tiles


@dataclass(frozen=True)
class SourceFile:
    """A rendered file; `path` is its place in the package, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class Source:
    """The rendered source of the kernels that are compiled together: all of a CPU target's, one of a GPU target's.

    `phase` is that of its entries in the manifest. A GPU kernel's one file is named after its function, `tile` is how
    its work is cut, `heads` are the first and the end of the query heads that it is for, empty for all, and `table` is
    which table of its layer's schedule it reads, if it does.
    """

    target: Target
    specs: tuple[KernelSpec, ...]
    files: tuple[SourceFile, ...]
    phase: str = "any"
    tile: Tile | None = None
    heads: tuple[int, ...] = ()
    table: TableShape | None = None

    @property
    def interface(self) -> Interface:
        """How a GPU kernel is called."""
        return INTERFACES[self.phase, self.table is not None]


@dataclass(frozen=True)
class Binary:
    """One compiled file of the package, its kernels as the manifest lists them, and the tools that made it."""

    path: str
    data: bytes
    kernels: tuple[KernelEntry, ...]
    tools: tuple[Tool, ...]

    def to_bytes(self) -> bytes:
        """The binary as one string of bytes for the cache: a line of JSON, then the file's own bytes."""
        rest = {"path": self.path, "kernels": list(map(asdict, self.kernels)), "tools": list(map(asdict, self.tools))}
        return json.dumps(rest).encode() + b"\n" + self.data

    @classmethod
    def from_bytes(cls, stored: bytes) -> "Binary":
        """What `to_bytes` made."""
        line, _, data = stored.partition(b"\n")
        rest = json.loads(line)
        kernels = from_plain(tuple[KernelEntry, ...], rest["kernels"], "kernels")
        tools = from_plain(tuple[Tool, ...], rest["tools"], "tools")
        return cls(rest["path"], data, cast(tuple[KernelEntry, ...], kernels), cast(tuple[Tool, ...], tools))
