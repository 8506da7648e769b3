"""Runs rendered Triton kernels in Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported and spoils that process for compiling.
"""

import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Call:
    """One launch, in float16 or float32.

    q `[batch, length, heads, head_dim]`, as projections leave it; k and v `[batch, heads, length, head_dim]`; position
    and first_key int64 `[batch]`.
    """

    text: str
    name: str
    tile_rows: int
    q: Array
    k: Array
    v: Array
    position: Array
    first_key: Array
    scale: float


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets; submit `launch` to it."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process starts with the first task, and with the environment of now
            _restore(before)
            yield pool
    finally:
        _restore(before)


def launch(call: Call, write_lse: bool) -> tuple[Array, Array]:
    """out `[batch, length, heads, head_dim]` and lse `[batch, heads, length]`; what the kernel leaves alone is NaN."""
    import torch

    q = torch.from_numpy(call.q).transpose(1, 2)
    k, v = torch.from_numpy(call.k), torch.from_numpy(call.v)
    batch, heads, length, _ = q.shape
    out = torch.full(call.q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, length), torch.nan, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:  # the interpreter reads the text back when it first runs a function
        kernel = _load(call, Path(folder))
        kernel[(heads, batch, -(-length // call.tile_rows) + 1)](
            q,
            k,
            v,
            out,
            lse,
            torch.from_numpy(call.first_key),
            torch.from_numpy(call.position),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            length,
            int(write_lse),
            call.scale,
        )
    return out.numpy(), lse.numpy()


def _load(call: Call, folder: Path) -> Any:
    path = folder / f"{call.name}.py"
    path.write_text(call.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(call.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, call.name)


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = value
