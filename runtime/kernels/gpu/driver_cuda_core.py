"""CUDA's driver through cuda.core, NVIDIA's own Python interface.

Importing this module fails if cuda.core is not installed.
"""

import functools
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver as cuda
from cuda.core import LaunchConfig, ObjectCode, Stream, launch

from surgeon.runtime.errors import TargetError
from surgeon.runtime.kernels.gpu.driver import (
    C_TYPES,
    FREE_SHARED_BYTES,
    no_code,
    no_launch,
    no_occupancy,
    no_shared_memory,
)


class CudaCoreDriver:
    """CUDA through cuda.core, in each device's primary context, the one that torch uses."""

    name = "cuda.core"

    def __init__(self) -> None:
        self._contexts: dict[int, Any] = {}
        try:
            self._done(cuda.cuInit(0), "cuda")
        except RuntimeError as error:  # there is no libcuda.so.1
            raise TargetError(
                "cuda", "the driver libcuda.so.1", str(error)[:200], "install the device's driver, or run on the CPU"
            ) from None

    def load(
        self, image: bytes, where: str, symbol: str, types: Sequence[str], device: int, threads: int, shared_bytes: int
    ) -> "_Function":
        """See `Driver.load`."""
        context = self._context(device)
        cuda.cuCtxPushCurrent(context)
        try:
            try:
                kernel = ObjectCode.from_cubin(image).get_kernel(symbol)
            except Exception as error:  # cuda.core's own error type is none of its public names
                raise no_code(f"{where}: {symbol}", str(error)[:200]) from None
            if shared_bytes > FREE_SHARED_BYTES:
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = cuda.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, cuda.CUdevice(device))
                if status != cuda.CUresult.CUDA_SUCCESS:
                    raise no_shared_memory(where, shared_bytes, status.name)
        finally:
            cuda.cuCtxPopCurrent()
        return _Function(context, kernel, symbol, types, threads, shared_bytes)

    def _context(self, device: int) -> Any:
        if device not in self._contexts:
            handle = self._done(cuda.cuDeviceGet(device), f"cuda:{device}")
            self._contexts[device] = self._done(cuda.cuDevicePrimaryCtxRetain(handle), f"cuda:{device}")
        return self._contexts[device]

    def _done(self, answer: tuple[Any, ...], where: str) -> Any:
        status, *values = answer
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise TargetError(where, "a device that the driver opens", status.name, "check it with nvidia-smi")
        return values[0] if values else None


@functools.lru_cache(maxsize=4096)
def _config(grid: tuple[int, int, int], threads: int, shared_bytes: int) -> Any:
    return LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)


@functools.lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    """A wrapper that owns nothing, so that a later stream may reuse the handle."""
    return Stream.from_handle(handle)


class _Function:
    """A CUDA kernel and the context that it is launched in."""

    def __init__(
        self, context: Any, kernel: Any, symbol: str, types: Sequence[str], threads: int, shared_bytes: int
    ) -> None:
        self._context = context
        self._kernel = kernel
        self._symbol = symbol
        # A plain int stands for an address.
        self._types: list[Any] = [int if name == "pointer" else C_TYPES[name] for name in types]
        self._threads = threads
        self._shared_bytes = shared_bytes

    def programs_a_processor(self) -> int:
        """See `Function.programs_a_processor`."""
        function = cuda.CUfunction(int(self._kernel.handle))  # the driver also takes a kernel of the context's device
        cuda.cuCtxPushCurrent(self._context)
        try:
            status, programs = cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                function, self._threads, self._shared_bytes
            )
        finally:
            cuda.cuCtxPopCurrent()
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise no_occupancy(self._symbol, status.name)
        return int(programs)

    def launch(self, grid: tuple[int, int, int], stream: int, values: Sequence[int | float]) -> None:
        """See `Function.launch`."""
        config = _config(grid, self._threads, self._shared_bytes)
        arguments = [kind(value) for kind, value in zip(self._types, values, strict=True)]
        # The calling thread may have no context, or another device's.
        cuda.cuCtxPushCurrent(self._context)
        try:
            launch(_stream(stream), config, self._kernel, *arguments)
        except Exception as error:  # cuda.core's own error type is none of its public names
            raise no_launch(self._symbol, str(error)[:200]) from None
        finally:
            cuda.cuCtxPopCurrent()
