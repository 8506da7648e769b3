"""The interfaces to a driver: loading into devices, refusals, and a process like one on a serving machine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_calls import ATTRIBUTES, LAUNCHES, LOADS, arguments, entry_of, kernels, launches, only_cuda, tensors
from gpu_standin import Standin, standin_folder
from surgeon.runtime.errors import PackageError, TargetError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.interface import PHASES
from surgeon.runtime.package.reader import PackageFiles

pytest.importorskip("triton")


def test_code_is_loaded_once_a_kernel_into_the_device_that_launches_it(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    first, second = kernels(files, backend, driver), kernels(files, backend, driver, device=1)
    loads = [call for call in standin.log() if call["call"] == LOADS[way]]
    sizes = [len(files.files[entry_of(files, backend, phase).file]) for phase in PHASES]
    assert [call["bytes"] for call in loads] == sizes * 2
    q, k, v = tensors(2, 300)
    for gpu in (first, second, first):
        gpu.attend(0, Operands(q, k, v, None, None, 1.0))
    found = launches(standin)
    assert [launch["place"] for launch in found] == ([100, 101, 100] if backend == "cuda" else [0, 1, 0])
    assert found[0]["function"] == found[2]["function"] != found[1]["function"]


@pytest.mark.parametrize("way", ["hip"])
def test_hip_leaves_the_current_device_as_it_was(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    kernels(files, backend, driver, device=3)
    devices = [call["device"] for call in standin.log() if call["call"] == "hipSetDevice"]
    assert devices == [3, 0] * len(PHASES)


@only_cuda
def test_more_than_48_kib_of_shared_memory_are_asked_for_at_load(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    launch = entry_of(files, backend).launch
    assert launch is not None
    assert launch.shared_bytes > 48 * 1024
    kernels(files, backend, driver)
    calls = [call for call in standin.log() if call["call"] == ATTRIBUTES[way]]
    large = [entry_of(files, backend, phase).launch for phase in ("prefill", "decode")]
    assert [(call["attribute"], call["value"]) for call in calls] == [
        (8, found and found.shared_bytes) for found in large
    ]

    standin.fail(ATTRIBUTES[way], 1)
    with pytest.raises(TargetError, match=rf"a device with {launch.shared_bytes} bytes.*got .*ERROR_INVALID_VALUE"):
        kernels(files, backend, driver)
    standin.fail(ATTRIBUTES[way], 0)


def test_code_that_the_driver_does_not_take(files: PackageFiles, backend: str, driver: Driver) -> None:
    path = entry_of(files, backend).file
    damaged = dataclasses.replace(files, files=dict(files.files) | {path: b"no code at all, though long enough " * 4})
    with pytest.raises(
        PackageError, match=r"expected code that the driver loads, got .*ERROR_INVALID_IMAGE.*; compile"
    ):
        kernels(damaged, backend, driver)


def test_a_kernel_that_is_not_in_the_code(files: PackageFiles, backend: str, driver: Driver) -> None:
    code = {entry_of(files, backend).file: files.files[entry_of(files, backend, "combine").file]}
    swapped = dataclasses.replace(files, files=dict(files.files) | code)
    with pytest.raises(
        PackageError, match=r"attention_000: expected code that the driver loads, got .*ERROR_NOT_FOUND"
    ):
        kernels(swapped, backend, driver)


def test_a_launch_that_the_driver_refuses(
    files: PackageFiles, way: str, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    call = LAUNCHES[way]
    standin.fail(call, 1)
    with pytest.raises(TargetError, match=r"launch of attention_000: expected a launch, got .*ERROR_INVALID_VALUE"):
        gpu.attend(0, Operands(*tensors(2, 300), None, None, 1.0))
    standin.fail(call, 0)


def test_a_device_that_is_not_there(files: PackageFiles, backend: str, driver: Driver, standin: Standin) -> None:
    call = {"cuda": "cuDevicePrimaryCtxRetain", "hip": "hipSetDevice"}[backend]
    standin.fail(call, 101)
    with pytest.raises(
        TargetError, match=rf"{backend}:7: expected a device that the driver opens, got .*ERROR_INVALID_D"
    ):
        kernels(files, backend, driver, device=7)
    standin.fail(call, 0)


HELPERS = Path(__file__).parents[3] / "helpers"

SERVING = """
import ctypes, json, sys, time, types
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jinja2", "networkx", "triton", *sys.argv[2:]) or name.startswith("surgeon.compiler"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Missing())
import torch
from gpu_standin import FakeStream, on_gpu, standin_folder
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
torch.Tensor.cuda = lambda tensor, device: tensor
torch.cuda.current_stream = lambda device: FakeStream(77)
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
from surgeon.runtime import load
from surgeon.runtime.operands import Operands
begin = time.perf_counter()
package = load(sys.argv[1], strict=True, device="cuda")
print(f"loaded in {time.perf_counter() - begin:.3f} s", file=sys.stderr)
q = torch.zeros((1, 4, 200, 128), dtype=torch.bfloat16)
k, v = torch.zeros((2, 1, 2, 200, 128), dtype=torch.bfloat16)
package.kernels.run(0, Operands(on_gpu(q), on_gpu(k), on_gpu(v), None, None, 0.5))
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
library = ctypes.CDLL("libcuda.so.1")
library.standin_log.restype = ctypes.c_char_p
launch = json.loads(library.standin_log().decode().splitlines()[-1])
driver = package.kernels.devices.on(torch.device("cuda", 0)).driver
print(json.dumps({"driver": driver, "q": q.data_ptr(), "launch": launch}))
"""


@pytest.mark.parametrize("way", ["cuda.core", "ctypes on libcuda.so.1"])
def test_a_serving_machine_needs_no_triton(folder: Path, files: PackageFiles, way: str) -> None:
    if way == "cuda.core":
        pytest.importorskip("cuda.core")
    done = subprocess.run(
        [sys.executable, "-c", SERVING, str(folder), *([] if way == "cuda.core" else ["cuda"])],
        env=os.environ | {"LD_LIBRARY_PATH": str(standin_folder()), "PYTHONPATH": str(HELPERS)},
        cwd=standin_folder(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["driver"] == way
    assert found["launch"]["stream"] == 77
    values = arguments(entry_of(files, "cuda"), found["launch"])
    assert (values["q"], values["num_queries"], values["scale"]) == (found["q"], 200, 0.5)


def test_no_driver_is_a_target_error() -> None:
    script = (
        "import ctypes, sys\n"
        "from surgeon.runtime.kernels.gpu.open_driver import open_driver\n"
        "from surgeon.runtime.errors import TargetError\n"
        "def missing(name, *more, **options): raise OSError(f'{name}: no such file')\n"
        "ctypes.CDLL = missing\n"
        "try: open_driver('hip')\n"
        "except TargetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=HELPERS, capture_output=True, text=True)
    assert done.stdout.startswith("hip: expected the driver libamdhip64.so, got libamdhip64.so: no such file; install")
