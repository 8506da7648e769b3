"""The interface of a driver, which loads and launches compiled GPU code; each implementation has its own module."""

import ctypes
from collections.abc import Sequence
from typing import Protocol

from surgeon.runtime.errors import PackageError, TargetError

C_TYPES = {"pointer": ctypes.c_void_p, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
"""The C types of a kernel's arguments, by their names in the manifest."""

FREE_SHARED_BYTES = 48 * 1024
"""Bytes of shared memory that a CUDA program may use without requesting them when the code is loaded."""


class Function(Protocol):
    """A kernel in one device's memory."""

    def programs_a_processor(self) -> int:
        """The number of its programs that a multiprocessor of the function's device holds at once.

        Raises:
            TargetError: the driver does not say.
        """

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        """Queues the kernel on a stream of the function's own device, without allocating or waiting.

        Raises:
            TargetError: the driver refuses the launch.
        """


class Driver(Protocol):
    """Access to one vendor's driver."""

    name: str

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> Function:
        """Loads code into the device of this number and finds a kernel in it.

        `types` are those of the kernel's arguments, keys of `C_TYPES`. `threads` and `shared_bytes`, its dynamic shared
        memory, are per program. `where` names the file in errors.

        Raises:
            PackageError: the driver does not take the code, or finds no such kernel in it.
            TargetError: the device has too little shared memory, or there is no device of this number.
        """


def no_code(where: str, got: str) -> PackageError:
    """The error for code that a driver does not load."""
    return PackageError(where, "code that the driver loads", got, "compile the package again for this device's target")


def no_launch(symbol: str, got: str) -> TargetError:
    """The error for a kernel that a driver does not launch."""
    return TargetError(f"launch of {symbol}", "a launch", got, "check the device with the vendor's tools")


def no_occupancy(symbol: str, got: str) -> TargetError:
    """The error for a kernel of which a driver does not say how many programs run at once."""
    expected = "the number of programs that a multiprocessor holds"
    return TargetError(f"occupancy of {symbol}", expected, got, "check the device with the vendor's tools")


def no_shared_memory(where: str, shared_bytes: int, got: str) -> TargetError:
    """The error for a kernel that needs more shared memory than a device has."""
    return TargetError(
        where,
        f"a device with {shared_bytes} bytes of shared memory per program",
        got,
        "compile the package for this device's own target",
    )
