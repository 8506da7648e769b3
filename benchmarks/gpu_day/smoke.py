"""The first stage: versions, the card, and one call of each kernel against fp64, with all that a repair needs."""

import importlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_day.calls import block_mask, wait
from gpu_day.day import Day, Row, Tell
from inputs.topologies import inputs
from measure.checked import checked
from surgeon.runtime import load
from surgeon.runtime.kernels.gpu.driver import C_TYPES, Driver, Function

PACKAGE = "smoke"
STAGES = "smoke-stages"
"""The folder with what every stage of the package's compilation made."""
VERSIONS = ("torch", "triton", "transformers", "numpy", "safetensors", "cuda-core")


def smoke(day: Day, packages: Path, tell: Tell) -> None:
    """Tells the versions and the card, then the errors of a prefill and of a decoded token, and what each took to load.

    What is launched is told before it is, so that a launch that ends the process is known too.
    """
    tell(versions(day))
    _record_launches(tell)
    topology = day.topology(day.shape, 8 * day.shape.block_size, 0.5)
    mask, length = block_mask(day, topology), topology.num_blocks * topology.block_size
    for phase, q_length in (("prefill", length), ("decode", 1)):
        tensors = inputs(day.shape, q_length, length, day.torch_dtype, device=day.device)
        wait(day)
        started = time.perf_counter()
        package = load(packages / PACKAGE, strict=True, device=day.device)
        found = package.attention(0, *tensors)
        wait(day)
        seconds = time.perf_counter() - started
        error = checked(phase, mask, topology.block_size, tensors, found)
        tell({"phase": phase, "error": error, "first_call_s": seconds})


def versions(day: Day) -> Row:
    """The device, its driver, and the versions of all that runs."""
    found: Row = {"device": day.device, "target": day.target, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if day.device == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda or torch.version.hip)}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
            found["nvidia-smi"] = done.stdout.strip() or done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia-smi"] = str(error)
    return found


def _record_launches(tell: Tell) -> None:
    """Has every launch of this process told: symbol, code, grid, and each argument's type, value and bytes."""
    kernels: Any = importlib.import_module("surgeon.runtime.kernels.gpu.kernels")
    opened = kernels.open_driver
    kernels.open_driver = lambda backend: _Recording(opened(backend), tell)


class _Recording:
    """A driver whose functions tell their launches."""

    def __init__(self, driver: Driver, tell: Tell) -> None:
        self.name, self._driver, self._tell = driver.name, driver, tell

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> Function:
        about: Row = {"driver": self.name, "threads": threads, "shared_bytes": shared_bytes}
        self._tell({"loading": symbol, "from": where, **about})
        loaded = self._driver.load(image, where, symbol, types, device, threads, shared_bytes)
        return _Told(loaded, symbol, types, self._tell)


class _Told:
    """A kernel whose launches are told."""

    def __init__(self, function: Function, symbol: str, types: Sequence[str], tell: Tell) -> None:
        self._function, self._symbol, self._types, self._tell = function, symbol, types, tell

    def programs_a_processor(self) -> int:
        return self._function.programs_a_processor()

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        packed = [
            bytes(C_TYPES[kind](value)).hex()  # type: ignore[arg-type]
            for kind, value in zip(self._types, values, strict=True)
        ]
        arguments = [list(each) for each in zip(self._types, values, packed, strict=True)]
        self._tell({"launching": self._symbol, "grid": list(grid), "stream": stream, "arguments": arguments})
        self._function.launch(grid, stream, values)
