"""Devices seen from the package: the device that a call runs on, and its code."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_calls import LOADS, TARGETS, arguments, by_any_way, entry_of, launches, second_kv_head, tensors, topology
from gpu_standin import OnGpu, Standin, on_gpu
from surgeon.compiler import compile_package
from surgeon.runtime import load
from surgeon.runtime.errors import PackageError, PatchError, TargetError
from surgeon.runtime.kernels.gpu.targets import choose_target, target_of
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target

pytest.importorskip("triton")


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_call_goes_where_its_tensors_are(folder: Path, files: PackageFiles, backend: str, standin: Standin) -> None:
    package = load(folder, strict=True, device="cuda")
    assert package.dtypes_on("cuda:0") == (torch.bfloat16,)
    assert [call for call in standin.log() if call["call"] in LOADS.values()]
    q, k, v = tensors(5, 300)
    out = package.kernels.run(0, Operands(on_gpu(q), on_gpu(k), on_gpu(v), None, None, 1.0))
    assert isinstance(out, OnGpu)
    assert len(launches(standin)) == 1
    package.part(range(1, 2)).kernels.run(0, Operands(*map(on_gpu, second_kv_head(5)), None, None, 1.0))
    (part,) = launches(standin)
    assert arguments(entry_of(files, backend), part)["first_kv_head"] == 1
    assert not package.attention(0, q, k, v).any()
    assert launches(standin) == []


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_first_call_loads_what_it_needs(folder: Path, backend: str, standin: Standin) -> None:
    package = load(folder)
    assert standin.log() == []
    q, k, v = map(on_gpu, tensors(5, 300))
    package.kernels.run(0, Operands(q, k, v, None, None, 1.0))
    assert len(launches(standin)) == 1


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_package_without_cpu_kernels_is_loaded_for_the_gpu(backend: str, standin: Standin, tmp_path: Path) -> None:
    out = compile_package(topology(), tmp_path / "kernels", [TARGETS[backend]], dtypes=["bf16"])
    package = load(out, strict=True)
    q, k, v = map(on_gpu, tensors(5, 300))
    package.kernels.run(0, Operands(q, k, v, None, None, 1.0))
    assert len(launches(standin)) == 1
    with pytest.raises(TargetError, match=r"expected kernels for cpu, got only cuda:90"):
        package.attention(0, *tensors(5, 300))


@by_any_way
@pytest.mark.usefixtures("fake_gpu", "standin")
def test_a_dtype_without_gpu_kernels(folder: Path, backend: str) -> None:
    q, k, v = (on_gpu(tensor.float()) for tensor in tensors(5, 300))
    with pytest.raises(PatchError, match=r"attention: q: expected one of torch.bfloat16, got torch.float32"):
        load(folder).kernels.run(0, Operands(q, k, v, None, None, 1.0))


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_package_without_the_devices_target(
    folder: Path, backend: str, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (10, 0))
    with pytest.raises(
        TargetError, match=r"expected kernels for cuda:100, .*got only cpu, cuda:90, hip:gfx942; .*--target cuda:100"
    ):
        load(folder, device="cuda")
    assert standin.log() == []


@by_any_way
@pytest.mark.usefixtures("fake_gpu")
def test_a_damaged_binary_never_reaches_the_driver(
    folder: Path, files: PackageFiles, backend: str, standin: Standin, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "kernels")
    path = entry_of(files, backend).file
    (copy / path).write_bytes(files.files[path][:-1] + b"!")
    with pytest.raises(PackageError, match=rf"{path}: expected SHA-256 .*the file is damaged: compile the package"):
        load(copy, device="cuda")
    assert standin.log() == []


def test_a_gpu_where_there_is_none(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TargetError, match=r"cuda: expected a GPU that torch can use, got none"):
        load(folder, device="cuda")


def test_a_device_of_another_kind(folder: Path) -> None:
    package = load(folder)
    q, k, v = (tensor.to("meta") for tensor in tensors(5, 300))
    with pytest.raises(TargetError, match=r"expected tensors on the CPU or a GPU, got meta"):
        package.kernels.run(0, Operands(q, k, v, None, None, 1.0))


@pytest.mark.parametrize(
    ("packaged", "own", "chosen"),
    [
        (["cpu", "cuda:80", "cuda:90"], "cuda:90", "cuda:90"),
        (["cuda:80", "cuda:86", "cuda:89"], "cuda:86", "cuda:86"),
        (["cuda:80", "cuda:86"], "cuda:89", "cuda:86"),
        (["cuda:86", "cuda:89"], "cuda:80", None),
        (["cuda:80"], "cuda:90", None),
        (["cuda:100"], "cuda:103", None),
        (["hip:gfx942"], "hip:gfx942", "hip:gfx942"),
        (["hip:gfx90a"], "hip:gfx942", None),
        (["cpu"], "cuda:90", None),
    ],
)
def test_which_code_a_device_runs(files: PackageFiles, packaged: list[str], own: str, chosen: str | None) -> None:
    entries = tuple(dataclasses.replace(files.manifest.kernels[0], target=target) for target in packaged)
    manifest = dataclasses.replace(files.manifest, kernels=entries)
    if chosen is not None:
        assert str(choose_target(manifest, Target.parse(own), "here")) == chosen
        return
    message = (
        rf"here: expected kernels for {own}, this device's target, got only {', '.join(packaged)}; .*--target {own}"
    )
    with pytest.raises(TargetError, match=message):
        choose_target(manifest, Target.parse(own), "here")


def test_the_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (12, 0))
    assert target_of(torch.device("cuda", 0)) == Target("cuda", "120")

    properties = SimpleNamespace(gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert target_of(torch.device("cuda", 0)) == Target("hip", "gfx90a")
