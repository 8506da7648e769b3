"""A package's kernels on each device that calls come from."""

import threading

import torch

from surgeon.runtime.errors import TargetError
from surgeon.runtime.kernels.cpu.kernels import CpuKernels
from surgeon.runtime.kernels.gpu.kernels import GpuKernels, open_gpu
from surgeon.runtime.package.reader import PackageFiles

_CPU = torch.device("cpu")


def placed(device: str | torch.device) -> torch.device:
    """The device as its tensors name it: a GPU always with its number.

    Raises:
        TargetError: the device is the current GPU, and torch can use none.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        if not torch.cuda.is_available():
            raise TargetError(str(device), "a GPU that torch can use", "none", "load the package for the CPU")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


class DeviceKernels:
    """The kernels of a package, loaded for each device on first use, from any thread.

    `strict` and `cpu_variant` are those of `surgeon.runtime.load`.
    """

    def __init__(self, files: PackageFiles, strict: bool, cpu_variant: str | None) -> None:
        self._files = files
        self._strict = strict
        self._cpu_variant = cpu_variant
        self._loaded: dict[torch.device, CpuKernels | GpuKernels] = {}
        self._loading = threading.Lock()

    @property
    def cpu(self) -> CpuKernels:
        """The kernels on the CPU."""
        kernels = self.on(torch.device("cpu"))
        assert isinstance(kernels, CpuKernels)
        return kernels

    @property
    def cpu_if_loaded(self) -> CpuKernels | None:
        """The kernels on the CPU, unless they are still to be loaded."""
        kernels = self._loaded.get(_CPU)
        return kernels if isinstance(kernels, CpuKernels) else None

    def gpu(self, device: torch.device) -> GpuKernels:
        """The kernels on a GPU, for calls that run on no other device.

        Raises:
            PackageError, TargetError: as `on`, or the device is not a GPU.
        """
        kernels = self.on(device)
        if not isinstance(kernels, GpuKernels):
            raise TargetError(str(self._files.folder), "tensors on a GPU", str(device), "move them to one")
        return kernels

    def on(self, device: torch.device) -> CpuKernels | GpuKernels:
        """The kernels on the device of a tensor.

        Raises:
            PackageError: the kernels are damaged or of another version.
            TargetError: the package holds none for the device.
        """
        kernels = self._loaded.get(device)
        if kernels is not None:
            return kernels
        with self._loading:
            if device not in self._loaded:
                self._loaded[device] = self._load(device)
            return self._loaded[device]

    def _load(self, device: torch.device) -> CpuKernels | GpuKernels:
        if device.type == "cpu":
            return CpuKernels(self._files, self._cpu_variant)
        if device.type == "cuda":
            return open_gpu(self._files, device, self._strict)
        raise TargetError(
            str(self._files.folder), "tensors on the CPU or a GPU", str(device), "move them to one of these"
        )
