"""Parts of a package that are whole but not from one compile: a kernel says what it was made for."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from surgeon.compiler import Topology, compile_package
from surgeon.runtime import load
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.kernel_digest import kernel_digest
from surgeon.runtime.package.schedule import HeadSchedule, Piece
from topologies import balanced_tree, build, head

SCHEDULES = "schedule.safetensors"
LIBRARY = "cpu/attention.so"


def topology(*windows: int, **shape: Any) -> Topology:
    """One layer for each window."""
    layers = [[head(window=window)] for window in windows]
    return build(layers, [{"linkage": balanced_tree(8)}], **{"head_dim": 32, "num_blocks": 8} | shape)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages of one shape, "one" and "other" of other windows, and "refuses" of the first ones with another rule."""
    folder = tmp_path_factory.mktemp("packages")
    made = {"one": topology(1, 2), "other": topology(3, 2), "refuses": topology(1, 2, beyond="error")}
    return {name: compile_package(of, folder / name, dtypes=["fp32"]) for name, of in made.items()}


@pytest.fixture
def package(packages: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages["one"], tmp_path / "kernels"))


def rewrite(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest, and brings its sizes and hashes up to date."""
    root = json.loads((package / "manifest.json").read_text())
    change(root)
    for entry in root["files"]:
        data = (package / entry["path"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (package / "manifest.json").write_text(json.dumps(root))


def swap_layers(root: dict[str, Any]) -> None:
    for kernel in root["kernels"]:
        kernel["layers"] = [1 - layer for layer in kernel["layers"]]


def refused(package: Path, text: str) -> None:
    with pytest.raises(PackageError, match=text):
        load(package)


def test_a_package_as_it_was_made(packages: dict[str, Path]) -> None:
    assert {name: load(folder).manifest.layers for name, folder in packages.items()} == dict.fromkeys(packages, (0, 1))


def test_kernels_for_each_others_layers(package: Path) -> None:
    rewrite(package, swap_layers)
    refused(package, r"attention_00\d\.layers: expected \[\d\], as the manifest has it, got \[\[\d\]\]")


def test_kernels_and_schedules_for_each_others_layers(package: Path) -> None:
    tensors = safetensors.numpy.load_file(package / SCHEDULES)
    for number in range(2):
        tensors[f"attention_00{number}.layers"][:] = 1 - number
    (package / SCHEDULES).write_bytes(safetensors.numpy.save(tensors))
    rewrite(package, swap_layers)
    refused(
        package, r"attention\.so: surgeon_attention_00\d: expected a kernel for this package's topology, layers, sch"
    )


@pytest.mark.parametrize("name", ["other", "refuses"])
def test_another_packages_library(packages: dict[str, Path], package: Path, name: str) -> None:
    shutil.copy(packages[name] / LIBRARY, package / LIBRARY)
    rewrite(package, lambda _root: None)
    refused(package, r"attention\.so: surgeon_attention_00\d: expected a kernel for this package's .*; do not use this")


def test_another_packages_schedules(packages: dict[str, Path], package: Path) -> None:
    shutil.copy(packages["other"] / SCHEDULES, package / SCHEDULES)
    rewrite(package, lambda _root: None)
    refused(package, r"schedule\.safetensors: topology_sha256: expected [0-9a-f]{64}, got [0-9a-f]{64}")


@pytest.mark.parametrize("schedules_too", [False, True])
def test_another_packages_topology(packages: dict[str, Path], package: Path, schedules_too: bool) -> None:
    for path in ("topology.json", *([SCHEDULES] if schedules_too else [])):
        shutil.copy(packages["other"] / path, package / path)
    text = (package / "topology.json").read_bytes().removesuffix(b"\n")
    rewrite(package, lambda root: root.update(topology_sha256=hashlib.sha256(text).hexdigest()))
    refused(package, "surgeon_attention_00" if schedules_too else r"safetensors: topology_sha256: expected")


def test_changed_schedules(package: Path) -> None:
    tensors = safetensors.numpy.load_file(package / SCHEDULES)
    pieces = tensors["attention_001.pieces"]
    pieces[pieces[:, 4] == -1, 4] = 0  # a window of one block in place of two
    (package / SCHEDULES).write_bytes(safetensors.numpy.save(tensors))
    rewrite(package, lambda _root: None)
    refused(package, r"attention\.so: surgeon_attention_001: expected a kernel")


def test_changed_last_readers(package: Path) -> None:
    tensors = safetensors.numpy.load_file(package / SCHEDULES)
    tensors["attention_001.last_readers"][0, 0] -= 1  # a cache would drop a block that is read again
    (package / SCHEDULES).write_bytes(safetensors.numpy.save(tensors))
    rewrite(package, lambda _root: None)
    refused(package, r"attention\.so: surgeon_attention_001: expected a kernel")


def test_a_dtype_that_the_library_was_not_compiled_for(package: Path) -> None:
    rewrite(package, lambda root: root["kernels"].extend([kernel | {"dtype": "bf16"} for kernel in root["kernels"]]))
    refused(package, r"attention\.so: surgeon_attention_00\d: expected a kernel")


def test_everything_that_a_kernel_is_made_for_is_in_its_digest() -> None:
    one, other = (HeadSchedule((), (Piece(0, 9, 0, 0, begin, True),)) for begin in (0, -1))
    usual: dict[str, Any] = {
        "topology_sha256": "a",
        "layers": (0, 1),
        "heads": (one, other),
        "dtypes": {"fp32", "bf16"},
        "last_readers": np.array([[1, 2]]),
        "num_key_value_heads": 1,
        "head_dim": 32,
        "block_size": 64,
        "num_rows": 9,
    }
    changes: dict[str, Any] = {"topology_sha256": "b", "layers": (0, 2), "heads": (other, one)}
    changes |= {"dtypes": {"fp32"}, "last_readers": np.array([[1, 3]])}
    changes |= dict.fromkeys(("num_key_value_heads", "head_dim", "block_size", "num_rows"), 2)
    digests = {kernel_digest(**usual | {name: value}) for name, value in changes.items()} | {kernel_digest(**usual)}
    assert len(digests) == 1 + len(changes)
    copied = HeadSchedule((), (Piece(0, 9, 0, 0, 0, True),))
    same: dict[str, Any] = {"heads": (copied, other), "dtypes": ["bf16", "fp32"]}
    same |= {"last_readers": usual["last_readers"].astype(np.int32)}
    assert kernel_digest(**usual) == kernel_digest(**usual | same)
