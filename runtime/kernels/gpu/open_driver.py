"""The choice of the interface to a GPU's driver."""

from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.driver_ctypes import CudaDriver, HipDriver


def open_driver(backend: str) -> Driver:
    """Opens the driver for "cuda", through cuda.core if that is installed and ctypes if not, or for "hip".

    Raises:
        TargetError: the machine has no such driver.
    """
    if backend == "hip":
        return HipDriver()
    try:
        from surgeon.runtime.kernels.gpu.driver_cuda_core import CudaCoreDriver
    except ImportError:
        return CudaDriver()
    return CudaCoreDriver()
