"""CUDA's and HIP's drivers through ctypes, which needs nothing but the vendor's own library.

Source: the CUDA driver API (cuda.h) and the HIP runtime API (hip_runtime_api.h).
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from surgeon.runtime.errors import TargetError
from surgeon.runtime.kernels.gpu.driver import (
    C_TYPES,
    FREE_SHARED_BYTES,
    no_code,
    no_launch,
    no_occupancy,
    no_shared_memory,
)

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
_LAUNCH_TYPES: list[Any] = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]


class CudaDriver:
    """libcuda.so.1. Code is loaded into a device's primary context, the one that torch uses."""

    name = "ctypes on libcuda.so.1"

    def __init__(self) -> None:
        self._library = _open("cuda", "libcuda.so.1")
        self._library.cuLaunchKernel.argtypes = _LAUNCH_TYPES
        self._contexts: dict[int, c_void_p] = {}
        self._check(self._library.cuInit(c_uint(0)), "cuda")

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> "_CudaFunction":
        """See `Driver.load`."""
        library = self._library
        context = self._context(device)
        module, function = c_void_p(), c_void_p()
        self._check(library.cuCtxPushCurrent_v2(context), f"cuda:{device}")
        try:
            if code := library.cuModuleLoadData(byref(module), c_char_p(image)):
                raise no_code(where, self.error(code))
            if code := library.cuModuleGetFunction(byref(function), module, c_char_p(symbol.encode())):
                raise no_code(f"{where}: {symbol}", self.error(code))
            if shared_bytes > FREE_SHARED_BYTES and (
                code := library.cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED_SIZE_BYTES), c_int(shared_bytes))
            ):
                raise no_shared_memory(where, shared_bytes, self.error(code))
        finally:
            library.cuCtxPopCurrent_v2(byref(c_void_p()))
        return _CudaFunction(
            library,
            context,
            _Launcher(
                library.cuLaunchKernel,
                library.cuOccupancyMaxActiveBlocksPerMultiprocessor,
                symbol,
                function,
                types,
                threads,
                shared_bytes,
                self.error,
            ),
        )

    def error(self, code: int) -> str:
        """The driver's own name of a status."""
        name = c_char_p()
        self._library.cuGetErrorName(c_int(code), byref(name))
        return (name.value or str(code).encode()).decode()

    def _context(self, device: int) -> c_void_p:
        if device not in self._contexts:
            handle, context = c_int(), c_void_p()
            self._check(self._library.cuDeviceGet(byref(handle), c_int(device)), f"cuda:{device}")
            self._check(self._library.cuDevicePrimaryCtxRetain(byref(context), handle), f"cuda:{device}")
            self._contexts[device] = context
        return self._contexts[device]

    def _check(self, code: int, where: str) -> None:
        if code:
            raise TargetError(where, "a device that the driver opens", self.error(code), "check it with nvidia-smi")


class _CudaFunction:
    """A CUDA kernel and the context that it was loaded into."""

    def __init__(self, library: ctypes.CDLL, context: c_void_p, launcher: "_Launcher") -> None:
        self._library = library
        self._context = context
        self._launcher = launcher

    def programs_a_processor(self) -> int:
        """See `Function.programs_a_processor`."""
        self._library.cuCtxPushCurrent_v2(self._context)
        try:
            return self._launcher.programs_a_processor()
        finally:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        """See `Function.launch`."""
        # The calling thread may have no context, or another device's.
        self._library.cuCtxPushCurrent_v2(self._context)
        try:
            self._launcher.launch(grid, stream, values)
        finally:
            self._library.cuCtxPopCurrent_v2(byref(c_void_p()))


class HipDriver:
    """libamdhip64.so. HIP has no contexts: the calling thread's current device is what counts."""

    name = "ctypes on libamdhip64.so"

    def __init__(self) -> None:
        self._library = _open("hip", "libamdhip64.so")
        self._library.hipGetErrorName.restype = c_char_p
        self._library.hipModuleLaunchKernel.argtypes = _LAUNCH_TYPES

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> "_HipFunction":
        """See `Driver.load`."""
        library = self._library
        module, function = c_void_p(), c_void_p()
        with _HipDevice(library, device) as code:
            if code:
                raise TargetError(f"hip:{device}", "a device that the driver opens", self.error(code), "check rocminfo")
            if code := library.hipModuleLoadData(byref(module), c_char_p(image)):
                raise no_code(where, self.error(code))
            if code := library.hipModuleGetFunction(byref(function), module, c_char_p(symbol.encode())):
                raise no_code(f"{where}: {symbol}", self.error(code))
        return _HipFunction(
            library,
            device,
            _Launcher(
                library.hipModuleLaunchKernel,
                library.hipModuleOccupancyMaxActiveBlocksPerMultiprocessor,
                symbol,
                function,
                types,
                threads,
                shared_bytes,
                self.error,
            ),
        )

    def error(self, code: int) -> str:
        """The driver's own name of a status."""
        name: bytes | None = self._library.hipGetErrorName(c_int(code))
        return (name or str(code).encode()).decode()


class _HipFunction:
    """A HIP kernel and the device that it was loaded into."""

    def __init__(self, library: ctypes.CDLL, device: int, launcher: "_Launcher") -> None:
        self._library = library
        self._device = device
        self._launcher = launcher

    def programs_a_processor(self) -> int:
        """See `Function.programs_a_processor`."""
        with _HipDevice(self._library, self._device):
            return self._launcher.programs_a_processor()

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        """See `Function.launch`."""
        with _HipDevice(self._library, self._device):
            self._launcher.launch(grid, stream, values)


class _HipDevice:
    """A context manager that makes a device the thread's current one; entering it returns the driver's status."""

    def __init__(self, library: ctypes.CDLL, device: int) -> None:
        self._library = library
        self._device = device
        self._before = c_int()

    def __enter__(self) -> int:
        if code := int(self._library.hipGetDevice(byref(self._before))):
            return code
        if self._before.value == self._device:
            return 0
        return int(self._library.hipSetDevice(c_int(self._device)))

    def __exit__(self, *_: object) -> None:
        if self._before.value != self._device:
            self._library.hipSetDevice(self._before)


class _Launcher:
    """Packs a kernel's arguments and launches it, by functions of either driver, which are called alike."""

    def __init__(
        self,
        launch: Callable[..., int],
        occupancy: Callable[..., int],
        symbol: str,
        function: c_void_p,
        types: Sequence[str],
        threads: int,
        shared_bytes: int,
        error: Callable[[int], str],
    ) -> None:
        fields = [(f"argument_{index}", C_TYPES[name]) for index, name in enumerate(types)]
        self._arguments: Any = type("Arguments", (ctypes.Structure,), {"_fields_": fields})
        self._offsets = [getattr(self._arguments, name).offset for name, _ in fields]
        self._places: Any = c_void_p * len(fields)
        self._launch = launch
        self._occupancy = occupancy
        self._symbol = symbol
        self._function = function
        self._threads = threads
        self._shared_bytes = shared_bytes
        self._error = error

    def programs_a_processor(self) -> int:
        found = c_int()
        code = self._occupancy(byref(found), self._function, c_int(self._threads), c_size_t(self._shared_bytes))
        if code:
            raise no_occupancy(self._symbol, self._error(code))
        return found.value

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        arguments = self._arguments(*values)  # for this launch only: several threads may launch at once
        base = ctypes.addressof(arguments)
        places = self._places(*[base + offset for offset in self._offsets])
        code = self._launch(self._function, *grid, self._threads, 1, 1, self._shared_bytes, stream, places, None)
        if code:
            raise no_launch(self._symbol, self._error(code))


def _open(backend: str, name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise TargetError(
            backend, f"the driver {name}", str(error)[:200], "install the device's driver, or run on the CPU"
        ) from None
