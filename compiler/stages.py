"""What the back half of the pipeline hands from stage to stage: KernelSpec ─▶ Source ─▶ Binary."""

from dataclasses import dataclass

from surgeon.compiler.schedule import LayerSchedule
from surgeon.runtime.manifest import KernelEntry, Tool
from surgeon.runtime.target import Target


@dataclass(frozen=True)
class KernelSpec:
    """One attention kernel to make: a distinct layer schedule on one target.

    `name` is unique within the package and names the schedule's tables; `layers` are the model's layers that share it.
    """

    name: str
    target: Target
    dtypes: tuple[str, ...]
    layers: tuple[int, ...]
    schedule: LayerSchedule
    head_dim: int


@dataclass(frozen=True)
class SourceFile:
    """A rendered file; `path` is its place in the package, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class Source:
    """The rendered source of the kernels that are compiled together: all of a CPU target's, one of a GPU target's."""

    target: Target
    specs: tuple[KernelSpec, ...]
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Binary:
    """One compiled file of the package, its kernels as the manifest lists them, and the tools that made it."""

    path: str
    data: bytes
    kernels: tuple[KernelEntry, ...]
    tools: tuple[Tool, ...]
