"""The segment tables that GPU kernels read, loaded into a GPU's memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.interface import TABLE_LENGTH, TABLE_POINTERS
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.segment_table import FILE, SegmentTable, read_table
from surgeon.runtime.package.tensors import Matrices

_BY_ROW = ("decode", "choose", "paged_decode")
"""The phases whose kernels read the decode table."""
_SHAPE = re.compile(r"prefill_[1-9]\d{0,3}x(?P<blocks>[1-9]\d{0,3})(x[1-9]\d{0,1})?")


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
                rows, blocks, heads = _table_shape(entry, files)
                patterns = model.num_attention_heads // heads
                if entry.phase in _BY_ROW:
                    patterns = model.num_key_value_heads
                table = read_table(matrices, name, patterns, rows // blocks, num_rows=-(-files.num_rows // rows))
                found[name] = _loaded(table, device)
            tables[entry.phase, layer] = found[name]
    return tables


def _table_shape(entry: KernelEntry, files: PackageFiles) -> tuple[int, int, int]:
    """The rows of blocks in a tile, the blocks in a unit, and the heads in a program, of the table that a kernel reads.

    Raises:
        PackageError: the table has another name than those of the kernel's phase and tile.
    """
    launch = entry.launch
    assert launch is not None
    rows = 1 if entry.phase in _BY_ROW else max(1, launch.tile_rows // files.manifest.block_size)
    shape = _SHAPE.fullmatch(entry.table)
    blocks = int(shape["blocks"]) if shape else 1
    heads = f"x{launch.program_heads}" if launch.program_heads > 1 else ""
    expected = "decode" if entry.phase in _BY_ROW else f"prefill_{rows}x{blocks}{heads}"
    if entry.table != expected or not 0 < blocks <= rows or rows % blocks:
        raise PackageError(
            f"{files.folder}: a kernel for {entry.target}: table",
            short_repr(expected),
            short_repr(entry.table),
            "do not use this package",
        )
    return rows, blocks, launch.program_heads


def _loaded(table: SegmentTable, device: int) -> LoadedTable:
    parts = tuple(torch.from_numpy(part).cuda(device) for part in (table.rows, table.plans, table.segments))
    addresses = zip(TABLE_POINTERS, parts, strict=True)
    arguments = {argument.name: part.data_ptr() for argument, part in addresses}
    return LoadedTable(arguments | {TABLE_LENGTH.name: table.rows.shape[1]}, parts)
