"""Kernel specifications: one attention kernel to make, with all that its backend needs to render it."""

from dataclasses import dataclass, field

from surgeon.compiler.schedule.liveness import Ints
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.specs.tiles import Device, Tile
from surgeon.runtime.package.kernel_digest import kernel_digest
from surgeon.runtime.package.target import Target


@dataclass(frozen=True)
class Shape:
    """The dimensions of the model that a template needs."""

    num_heads: int
    num_key_value_heads: int
    heads_per_kv_head: int
    head_dim: int
    block_size: int


@dataclass(frozen=True)
class KernelSpec:
    """One attention kernel to make: a distinct layer schedule on one target.

    `name` is unique within the package and names the schedule's tables; `layers` are the model's layers that share it.
    """

    topology_sha256: str
    name: str
    target: Target
    dtypes: tuple[str, ...]
    layers: tuple[int, ...]
    schedule: LayerSchedule
    head_dim: int

    @property
    def shape(self) -> Shape:
        """The shape of the kernel's layers."""
        num_heads, kv_heads = len(self.schedule.heads), self.schedule.num_key_value_heads
        return Shape(num_heads, kv_heads, num_heads // kv_heads, self.head_dim, self.schedule.block_size)


@dataclass(frozen=True)
class CpuSpec(KernelSpec):
    """A kernel of a CPU library; `last_readers` is the liveness table of its schedule."""

    last_readers: Ints = field(repr=False, compare=False)

    @property
    def symbol(self) -> str:
        """The function in the library that runs the kernel."""
        return f"surgeon_{self.name}"

    @property
    def digest(self) -> str:
        """The digest of all that the kernel is made for, which the library carries."""
        return kernel_digest(
            self.topology_sha256,
            self.layers,
            self.schedule.heads,
            dtypes=self.dtypes,
            last_readers=self.last_readers,
            num_key_value_heads=self.schedule.num_key_value_heads,
            head_dim=self.head_dim,
            block_size=self.schedule.block_size,
            num_rows=self.schedule.num_rows,
        )


@dataclass(frozen=True)
class GpuSpec(KernelSpec):
    """The kernels of a layer on a GPU: the device's resources, and the tile of each phase.

    `decode` is None if a KV head has too many query heads for a one-query kernel; the prefill kernels serve then.
    `paged_prefill` and `paged_decode` are the tiles of kernels for keys and values in pages, None without such kernels.
    """

    device: Device
    prefill: Tile
    decode: Tile | None
    paged_prefill: Tile | None = None
    paged_decode: Tile | None = None

    @property
    def is_routed(self) -> bool:
        """True if some of its heads choose blocks."""
        return self.schedule.router is not None
