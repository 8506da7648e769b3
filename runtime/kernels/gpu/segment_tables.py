"""The tables that GPU kernels read of their layers' schedules, out of a package's tables.safetensors."""

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles

FILE = "tables.safetensors"


@dataclass(frozen=True)
class SegmentTable:
    """One table of a schedule, int32, in a GPU's memory.

    `rows` `[KV heads or heads, rows]` gives each row of blocks its plan, `plans` `[plans, 3]` each plan its first
    segment, the first masked one and the end, `segments` `[segments, 4]` the blocks and who sees them.
    """

    rows: torch.Tensor
    plans: torch.Tensor
    segments: torch.Tensor


def read_tables(files: PackageFiles, entries: list[KernelEntry], device: int) -> dict[tuple[str, int], SegmentTable]:
    """The tables that a target's kernels read, by phase and layer, copied to a GPU.

    Raises:
        PackageError: a table is missing, damaged, or points outside of itself.
    """
    if not any(entry.table for entry in entries):
        return {}
    where = f"{files.folder}/{FILE}"
    try:
        tensors = safetensors.torch.load(files.files[FILE])
    except (KeyError, safetensors.SafetensorError) as error:
        raise _fault(where, "tables of segments", str(error)[:200]) from None
    model = files.manifest.model
    schedules = {layer: entry.schedule for entry in entries if entry.phase == "prefill" for layer in entry.layers}
    found: dict[str, SegmentTable] = {}
    tables = {}
    for entry in entries:
        for layer in entry.layers if entry.table else ():
            name = f"{schedules.get(layer, '')}.{entry.table}"
            if name not in found:
                patterns = model.num_key_value_heads if entry.phase == "decode" else model.num_attention_heads
                found[name] = _read(tensors, name, patterns, where, device)
            tables[entry.phase, layer] = found[name]
    return tables


def _read(tensors: dict[str, torch.Tensor], name: str, patterns: int, where: str, device: int) -> SegmentTable:
    parts = [tensors.get(f"{name}.{part}") for part in ("rows", "plans", "segments")]
    for part, tensor, columns in zip(("rows", "plans", "segments"), parts, (None, 3, 4), strict=True):
        if tensor is None or tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.numel() == 0:
            raise _fault(f"{where}: {name}.{part}", "an int32 matrix", "none" if tensor is None else str(tensor.shape))
        if columns is not None and tensor.shape[1] != columns:
            raise _fault(f"{where}: {name}.{part}", f"{columns} columns", str(tensor.shape[1]))
    rows, plans, segments = (tensor for tensor in parts if tensor is not None)
    if rows.shape[0] != patterns:
        raise _fault(f"{where}: {name}.rows", f"{patterns} heads", str(rows.shape[0]))
    if not _within(rows, plans.shape[0] - 1) or not _within(plans, segments.shape[0]):
        raise _fault(f"{where}: {name}", "plans and segments that exist", "numbers beyond them")
    return SegmentTable(rows.cuda(device), plans.cuda(device), segments.cuda(device))


def _within(numbers: torch.Tensor, last: int) -> bool:
    return bool((numbers >= 0).all()) and bool((numbers <= last).all())


def _fault(where: str, expected: str, got: str) -> PackageError:
    return PackageError(where, expected, got, "compile the package again")
