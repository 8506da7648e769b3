"""A driver for the fuzzer that takes code for its own processors with the right symbol, and records its launches."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch

from gpu_standin import FakeStream
from surgeon.runtime.kernels.gpu.driver import Function, no_code
from surgeon.runtime.kernels.gpu.kernels import GpuKernels
from surgeon.runtime.operands import operands_of
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target

PROCESSORS = 6


def pretend_a_gpu() -> None:
    """Makes this process take tensors on the CPU for a GPU's."""
    torch.cuda.current_stream = lambda _device: FakeStream(1)  # type: ignore
    torch.Tensor.cuda = lambda tensor, _device: tensor  # type: ignore


MACHINES = {"cuda": 190, "hip": 224}
"""The machine in the head of an ELF file."""


class Recorder:
    """A driver; `launches` are those of all its functions, as the code, its numbers, its grid and its arguments."""

    name = "recorder"

    def __init__(self, backend: str) -> None:
        self._machine = MACHINES[backend]
        self.launches: list[tuple[Any, ...]] = []

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> Function:
        name = re.escape(symbol.encode("utf-8", "surrogatepass"))
        if int.from_bytes(image[18:20], "little") != self._machine:
            raise no_code(where, "code for another machine")
        if not symbol or not re.search(rb"[\0.]" + name + rb"\0", image):
            raise no_code(f"{where}: {symbol!r:.80}", "no such symbol")
        return _Function(self, (hashlib.sha256(image).hexdigest(), symbol, tuple(types)), (threads, shared_bytes))


class _Function:
    def __init__(self, driver: Recorder, code: tuple[Any, ...], numbers: tuple[int, int]) -> None:
        self._driver, self._code, self._numbers = driver, code, numbers

    def programs_a_processor(self) -> int:
        return 2

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        self._driver.launches.append((self._code, self._numbers, grid, tuple(values)))


def kernels(files: PackageFiles, target: str) -> tuple[GpuKernels, Recorder]:
    """A package's kernels for a target, loaded into a recorder."""
    driver = Recorder(target.partition(":")[0])
    return GpuKernels(files, Target.parse(target), 0, PROCESSORS, True, driver), driver


def behaviour(
    files: PackageFiles, target: str, layers: Sequence[int], dtype: torch.dtype, shape: Any
) -> dict[str, str]:
    """The launches of a package's kernels: `code` with what arguments, and `launch` with what sizes.

    The contents of tables stand in the arguments in place of their addresses. Where prefill kernels also take single
    queries, since there are no others, nothing is said of these.
    """
    loaded, driver = kernels(files, target)
    tables = {
        address: hashlib.sha256(part.numpy().tobytes()).hexdigest()
        for table in loaded._tables.values()
        for address, part in zip(table.arguments.values(), table.parts, strict=False)
    }
    found = {}
    for layer in layers:
        for call, q_length, k_length in (("prefill", 200, 200), ("one query", 1, 700)):
            q = torch.zeros((1, q_length, shape.num_attention_heads, shape.head_dim), dtype=dtype).transpose(1, 2)
            k = torch.zeros((1, shape.num_key_value_heads, k_length, shape.head_dim), dtype=dtype)
            driver.launches.clear()
            loaded.attend(layer, operands_of(q, k, k, None, None, None))
            if q_length == 1 and not all((phase, layer, dtype) in loaded._kernels for phase in ("decode", "combine")):
                continue
            code = [
                (*launched, *(_value(kind, value, tables) for kind, value in zip(launched[2], values, strict=True)))
                for launched, _, _, values in driver.launches
            ]
            found[f"{target} {call} {layer} code"] = repr(code)
            found[f"{target} {call} {layer} launch"] = repr([launch[1:3] for launch in driver.launches])
    return found


def _value(kind: str, value: int | float, tables: dict[int, str]) -> object:
    return tables.get(int(value), bool(value)) if kind == "pointer" else value
