"""Drivers for tests on machines without a GPU: `gpu_standin.cpp` compiled as libcuda.so.1 and libamdhip64.so."""

import atexit
import ctypes
import functools
import json
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIBRARIES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}
PROGRAMS_A_PROCESSOR = 3
"""How many programs of any kernel a stand-in's multiprocessor holds."""
_FORMATS = {"pointer": "<Q", "i64": "<q", "i32": "<i", "fp32": "<f"}


@functools.cache
def standin_folder() -> Path:
    """A folder with both libraries, the same for all tests of a process: the linker keeps the first of a name."""
    folder = Path(tempfile.mkdtemp(prefix="surgeon-drivers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).with_name("gpu_standin.cpp")
    for name in LIBRARIES.values():
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            f"-DPROGRAMS_A_PROCESSOR={PROGRAMS_A_PROCESSOR}",
            f"-Wl,-soname,{name}",
            source,
            "-o",
            folder / name,
        ]
        subprocess.run(command, check=True)
    return folder


class Standin:
    """A loaded stand-in. From then on, the linker gives it to all code that asks for its name."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._library = ctypes.CDLL(str(folder / LIBRARIES[backend]))
        self._library.standin_log.restype = ctypes.c_char_p

    def log(self) -> list[dict[str, Any]]:
        """The calls since the last query, in order."""
        return [json.loads(line) for line in self._library.standin_log().decode().splitlines()]

    def fail(self, call: str, code: int) -> None:
        """Makes a driver function return `code` from now on; 0 makes it work again."""
        self._library.standin_fail(call.encode(), code)


def unpacked(values: list[str], types: list[str]) -> list[int | float]:
    """The recorded bytes of a launch as numbers."""
    return [struct.unpack(_FORMATS[kind], bytes.fromhex(value))[0] for value, kind in zip(values, types, strict=True)]


@dataclass(frozen=True)
class FakeStream:
    """A stand-in for the result of `torch.cuda.current_stream`, with the one attribute that the launcher reads."""

    cuda_stream: int


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on GPU 0: the launcher only passes on its address."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    """The tensor as an `OnGpu`, sharing memory."""
    return tensor.as_subclass(OnGpu)
