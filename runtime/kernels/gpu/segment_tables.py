"""The segment tables that GPU kernels read, loaded into a GPU's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.runtime.package.interface import TABLE_LENGTH, TABLE_POINTERS
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.segment_table import FILE, SegmentTable, read_table
from surgeon.runtime.package.tensors import Matrices


@dataclass(frozen=True)
class LoadedTable:
    """A table in a GPU's memory, held by `parts`, and the arguments by name of a kernel that reads it."""

    arguments: Mapping[str, int]
    parts: tuple[torch.Tensor, ...]


def load_tables(files: PackageFiles, entries: Sequence[KernelEntry], device: int) -> dict[tuple[str, int], LoadedTable]:
    """Copies the tables that a target's kernels read to a GPU; they are keyed by phase and layer.

    Raises:
        PackageError: a table is missing, damaged, or points outside itself.
    """
    if not any(entry.table for entry in entries):
        return {}
    matrices = Matrices(files.files.get(FILE), f"{files.folder}/{FILE}")
    model = files.manifest.model
    schedules = {layer: entry.schedule for entry in entries if entry.phase == "prefill" for layer in entry.layers}
    found: dict[str, LoadedTable] = {}
    tables = {}
    for entry in entries:
        for layer in entry.layers if entry.table else ():
            name = f"{schedules.get(layer, '')}.{entry.table}"
            if name not in found:
                patterns = model.num_key_value_heads if entry.phase == "decode" else model.num_attention_heads
                found[name] = _loaded(read_table(matrices, name, patterns), device)
            tables[entry.phase, layer] = found[name]
    return tables


def _loaded(table: SegmentTable, device: int) -> LoadedTable:
    parts = tuple(torch.from_numpy(part).cuda(device) for part in (table.rows, table.plans, table.segments))
    addresses = zip(TABLE_POINTERS, parts, strict=True)
    arguments = {argument.name: part.data_ptr() for argument, part in addresses}
    return LoadedTable(arguments | {TABLE_LENGTH.name: table.rows.shape[1]}, parts)
