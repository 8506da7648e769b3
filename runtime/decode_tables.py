"""The tables that GPU decoding kernels read, out of a package's decode.safetensors."""

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package import PackageFiles

FILE = "decode.safetensors"


@dataclass(frozen=True)
class DecodeTable:
    """One schedule's table, int32, in a GPU's memory.

    `rows` `[KV heads, rows]` gives each row of blocks its plan, `plans` `[plans, 2]` each plan its first and end
    segment, `segments` `[segments, 4]` the blocks and the heads that see them.
    """

    rows: torch.Tensor
    plans: torch.Tensor
    segments: torch.Tensor


def read_tables(files: PackageFiles, device: int) -> dict[str, DecodeTable]:
    """Every schedule's table by the schedule's name, copied to a GPU.

    Raises:
        PackageError: a table is missing, damaged, or points outside of itself.
    """
    where = f"{files.folder}/{FILE}"
    try:
        tensors = safetensors.torch.load(files.files[FILE])
    except (KeyError, safetensors.SafetensorError) as error:
        raise _fault(where, "decode tables", str(error)[:200]) from None
    schedules = {entry.schedule for entry in files.manifest.kernels if entry.phase == "prefill"}
    kv_heads = files.manifest.model.num_key_value_heads
    tables = {}
    for name in sorted(schedules):
        parts = [tensors.get(f"{name}.{part}") for part in ("rows", "plans", "segments")]
        for part, tensor, columns in zip(("rows", "plans", "segments"), parts, (None, 2, 4), strict=True):
            if tensor is None or tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.numel() == 0:
                raise _fault(
                    f"{where}: {name}.{part}", "an int32 matrix", "none" if tensor is None else str(tensor.shape)
                )
            if columns is not None and tensor.shape[1] != columns:
                raise _fault(f"{where}: {name}.{part}", f"{columns} columns", str(tensor.shape[1]))
        rows, plans, segments = (tensor for tensor in parts if tensor is not None)
        if rows.shape[0] != kv_heads:
            raise _fault(f"{where}: {name}.rows", f"{kv_heads} KV heads", str(rows.shape[0]))
        if not _within(rows, plans.shape[0] - 1) or not _within(plans, segments.shape[0]):
            raise _fault(f"{where}: {name}", "plans and segments that exist", "numbers beyond them")
        tables[name] = DecodeTable(rows.cuda(device), plans.cuda(device), segments.cuda(device))
    return tables


def _within(numbers: torch.Tensor, last: int) -> bool:
    return bool((numbers >= 0).all()) and bool((numbers <= last).all())


def _fault(where: str, expected: str, got: str) -> PackageError:
    return PackageError(where, expected, got, "compile the package again")
