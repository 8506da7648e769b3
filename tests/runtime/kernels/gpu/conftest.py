"""A package for both vendors, and stand-ins for their drivers that record their calls."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_calls import STREAM, TARGETS, topology
from gpu_standin import FakeStream, Standin, standin_folder
from surgeon.compiler import compile_package
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.driver_ctypes import CudaDriver, HipDriver
from surgeon.runtime.package.reader import PackageFiles, read_package


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for both vendors' GPUs and the CPU."""
    out = tmp_path_factory.mktemp("gpu") / "kernels"
    return compile_package(topology(), out, ["cpu", *TARGETS.values()], dtypes=["bf16"])


@pytest.fixture(scope="session")
def files(folder: Path) -> PackageFiles:
    return read_package(folder)


@pytest.fixture(params=["cuda.core", "cuda", "hip"])
def way(request: pytest.FixtureRequest) -> str:
    """The interface to a driver: cuda.core, or a vendor's library through ctypes."""
    return str(request.param)


@pytest.fixture
def backend(way: str) -> str:
    return way.removesuffix(".core")


@pytest.fixture
def standin(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: FakeStream(STREAM))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, _device: tensor)
    found = Standin(standin_folder(), backend)
    found.log()
    yield found
    found.log()


@pytest.fixture
def driver(standin: Standin, way: str) -> Driver:
    if way == "cuda.core":
        pytest.importorskip("cuda.core")
        from surgeon.runtime.kernels.gpu.driver_cuda_core import CudaCoreDriver

        return CudaCoreDriver()
    return CudaDriver() if way == "cuda" else HipDriver()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=132))
