"""The manifest of a package, `manifest.json`, as frozen dataclasses, with its writer and its strict reader.

Source: package formats version 1 and, with routed layers, 2. A kernel is one attention function for one dtype; equal
layers share it.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Any

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.strict_json import Fault, parse_root, read_plain

MAX_MANIFEST_BYTES = 16 * 2**20

CPU_ABI_VERSION = 9
"""Version of the call structure between the runtime and a CPU library."""

DIRECT_LIBRARY = "cpu/direct.so"
"""The library of the direct op in a package; one that was compiled without torch's headers has none."""

PERSISTENT_GRID = ("programs", "one", "one")
"""The grid of persistent programs, which take tasks until none is left."""

_FAULT = Fault(PackageError, "compile the package again with this version of surgeon")
_FORMAT, _UNROUTED, _ROUTED = "surgeon.package", 1, 2


@dataclass(frozen=True)
class ModelShape:
    """The shape of the model that a topology was learned on.

    `weights_sha256` is the identity of its frozen weights (`surgeon.runtime.weights_id`), or None for any weights.
    """

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    weights_sha256: str | None


@dataclass(frozen=True)
class FileEntry:
    """A file of the package: its path relative to the package, with forward slashes; its size in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel; its type is "pointer", "i32", "i64", "fp32" or "struct"."""

    name: str
    type: str


@dataclass(frozen=True)
class Launch:
    """The launch of a GPU kernel: threads per program, memory in bytes, the meaning of the three grid axes.

    `shared_bytes` and `scratch_bytes` are per program. The latter is in the device's memory: the caller provides it, at
    an address that is a multiple of 128.

    A grid axis is "row_tiles" (query tokens over `tile_rows`, rounded up, plus one if the first is not aligned),
    "query_heads" (over `program_heads`), "key_value_heads", "batch", "splits" (parts into which one query's keys are
    divided), "one", "programs" (as many as the device runs at once, at most one a task) or, for routed heads,
    "node_tiles" and "slot_tiles" (nodes, and units of queries, over `tile_rows`) and "slot_parts" (units of queries
    times the parts of their chosen blocks).
    """

    grid: tuple[str, ...]
    tile_rows: int
    threads: int
    shared_bytes: int
    scratch_bytes: int = 0
    program_heads: int = 1

    @property
    def persistent(self) -> bool:
        """True if the programs take tasks until none is left."""
        return self.grid == PERSISTENT_GRID


@dataclass(frozen=True)
class KernelEntry:
    """One compiled attention function, or a part of one.

    `layers` are the model's layers that it serves. `schedule` names its tables in schedule.safetensors and in
    tables.safetensors; it is empty for a kernel that serves every schedule. `table` names the one of a schedule's
    tables in tables.safetensors that it reads; it is empty if the kernel holds its blocks as code. `launch` is None for
    a CPU kernel, which is called. `preconditions` must have been checked by the caller, such as "name % 16 == 0".
    `phase` is "any", or on a GPU "prefill", which takes any number of queries, or "decode" and "combine", which
    together take one; before these, layers with routed heads have "write_nodes", "choose" and "attend_chosen". Kernels
    for keys and values in pages have "paged_" before the phase.
    `heads` are the first and the end of the query heads that it serves, empty for all.
    """

    target: str
    dtype: str
    layers: tuple[int, ...]
    schedule: str
    file: str
    symbol: str
    arguments: tuple[Argument, ...]
    launch: Launch | None
    preconditions: tuple[str, ...]
    phase: str = "any"
    heads: tuple[int, ...] = ()
    table: str = ""


@dataclass(frozen=True)
class Tool:
    """A program that made a part of the package, such as surgeon or g++, and the first line of its version text."""

    name: str
    version: str


@dataclass(frozen=True)
class Manifest:
    """Everything that a serving machine must know to verify, load and call the kernels of a package.

    `layers` are those that the topology covers; the others keep the model's own attention. `routed` are those of them
    with heads that choose blocks by content.
    """

    topology_sha256: str
    model: ModelShape
    block_size: int
    num_blocks: int
    beyond: str
    layers: tuple[int, ...]
    kernels: tuple[KernelEntry, ...]
    files: tuple[FileEntry, ...]
    tools: tuple[Tool, ...]
    routed: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that the package holds kernels for, sorted."""
        return tuple(sorted({kernel.target for kernel in self.kernels}))

    def to_json(self) -> str:
        """The text of manifest.json, the same for equal manifests."""
        plain = dataclasses.asdict(self)
        if not self.routed:
            del plain["routed"]
        root = {"format": _FORMAT, "version": _ROUTED if self.routed else _UNROUTED}
        return json.dumps(root | plain, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads the text of manifest.json.

        Raises:
            PackageError: the text is not JSON or is of another version, or a field is missing, unknown or of the wrong
                type.
        """
        version, plain = parse_root(text, _FORMAT, (_UNROUTED, _ROUTED), "manifest.json", _FAULT)
        if version == _UNROUTED:
            if "routed" in plain:
                raise _FAULT("manifest.json: routed", f"version {_ROUTED}", f"version {_UNROUTED}")
            plain["routed"] = []
        found = typing.cast(Manifest, from_plain(cls, plain, "manifest.json"))
        if version == _ROUTED and (not found.routed or not set(found.routed) <= set(found.layers)):
            raise _FAULT("manifest.json: routed", "some of the covered layers", short_repr(found.routed))
        return found


def from_plain(kind: Any, value: object, where: str) -> object:
    """Turns parsed JSON into `kind`, one of the dataclasses above or the type of a field of one.

    Raises:
        PackageError: a key is missing or unknown, or a value has another type; the message names `where` and the place.
    """
    return read_plain(kind, value, where, _FAULT)
