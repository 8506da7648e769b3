"""Routed layers in a package: one test for each way in which manifest, schedule and topology can contradict another."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import packages
import topologies
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.schedule import FILE
from surgeon.runtime.package.tensors import Matrix
from topologies import DENSE, window_head

ROUTED, PLAIN = [window_head(1, 2, route=3), window_head(1, 1)], [window_head(1, 2), DENSE]
TOPOLOGY = topologies.build([ROUTED, PLAIN, []], num_kv_heads=1, num_blocks=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return packages.write(tmp_path / "kernels", TOPOLOGY)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Applies a change to the parsed manifest."""
    file = folder / "manifest.json"
    root = json.loads(file.read_text())
    change(root)
    file.write_text(json.dumps(root))
    return folder


def scheduled(folder: Path, change: Callable[[dict[str, Matrix]], object]) -> PackageFiles:
    """The package's files with a change to the matrices of the schedules."""
    files = read_package(folder)
    tensors = safetensors.numpy.load(files.files[FILE])
    change(tensors)
    return dataclasses.replace(files, files=dict(files.files) | {FILE: safetensors.numpy.save(tensors)})


def test_a_routed_package_is_of_version_2_and_read_back(folder: Path) -> None:
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    files = read_package(folder)
    assert files.manifest.routed == (0,)
    assert [[head.route for head in files.schedules[layer].heads] for layer in (0, 1)] == [[3, 0], [0, 0]]
    assert files.manifest.from_json(files.manifest.to_json()) == files.manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.update(version=1), r"manifest\.json: routed: expected version 2, got version 1"),
        (lambda root: root.update(version=3), r"manifest\.json: version: expected 1 or 2, got 3, as surgeon"),
        (lambda root: root.pop("routed"), r"manifest\.json: expected the keys .*routed"),
        (lambda root: root.update(routed=[]), r"routed: expected some of the covered layers, got \(\)"),
        (lambda root: root.update(routed=[2]), r"routed: expected some of the covered layers, got \(2,\)"),
        (lambda root: root.update(routed=[-1]), r"routed: expected some of the covered layers, got \(-1,\)"),
        (lambda root: root.update(routed=["0"]), r"routed\[0\]: expected a value of type int, got '0'"),
        (lambda root: root.update(routed=[1]), r"routed: expected \[0\], as topology\.json has it, got \[1\]"),
        (lambda root: root.update(routed=[0, 1]), r"routed: expected \[0\], as topology\.json has it, got \[0, 1\]"),
    ],
    ids=[
        "version 1",
        "version 3",
        "version 2 without",
        "none",
        "not covered",
        "negative",
        "no number",
        "another",
        "one too many",
    ],
)
def test_a_manifest_of_other_routes(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        read_package(edited(folder, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _table: None, r"routes: expected an int32 matrix \[any, 1\], got none"),
        (lambda table: table[:, 0], r"routes: expected an int32 matrix \[any, 1\], got int32 \[2\]"),
        (lambda table: table[:1], r"routes: expected 2 heads, got 1"),
        (lambda table: -table, r"routes\[0\]: expected a number of blocks"),
        (lambda table: table * 0, r"routes: expected a routed head, as the manifest has it, got none"),
    ],
    ids=["missing", "flat", "too few", "negative", "all zero"],
)
def test_broken_routes(folder: Path, change: Callable[[Matrix], Matrix | None], message: str) -> None:
    def changed(tensors: dict[str, Matrix]) -> None:
        (name,) = (name for name in tensors if name.endswith(".routes"))
        table = change(tensors.pop(name))
        if table is not None:
            tensors[name] = np.ascontiguousarray(table)

    with pytest.raises(PackageError, match=message):
        _ = scheduled(folder, changed).schedules


def test_a_routed_schedule_of_a_layer_that_the_manifest_does_not_route(folder: Path) -> None:
    def shared(tensors: dict[str, Matrix]) -> None:
        tensors[f"{name}.layers"] = np.array([[0], [1]], dtype=np.int32)

    manifest = read_package(folder).manifest
    name = next(kernel.schedule for kernel in manifest.kernels if kernel.layers == (0,))
    kernels = tuple(dataclasses.replace(kernel, schedule=name) for kernel in manifest.kernels)
    changed = dataclasses.replace(scheduled(folder, shared), manifest=dataclasses.replace(manifest, kernels=kernels))
    with pytest.raises(PackageError, match=r"routes: expected none for layer 1, as the manifest has it, got some"):
        _ = changed.schedules
