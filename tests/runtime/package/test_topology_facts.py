"""The manifest's numbers are held against the topology: each edit is refused, whatever the hashes say."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import packages
import topologies
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.reader import read_package
from surgeon.runtime.package.topology_facts import check_topology

HEADS = [topologies.head(0, 0.0, 1, 1), topologies.head(0, 0.0, 0, 2)]
TOPOLOGY = topologies.build(
    [HEADS, HEADS[::-1], HEADS, []], [{"linkage": topologies.balanced_tree(8)}], num_kv_heads=1, num_blocks=8
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return packages.write(tmp_path / "kernels", TOPOLOGY)


def edited(folder: Path, **changes: Any) -> None:
    root = json.loads((folder / "manifest.json").read_text())
    model = {name: changes.pop(name) for name in list(changes) if name in root["model"]}
    (folder / "manifest.json").write_text(json.dumps(root | changes | {"model": root["model"] | model}))


def test_the_package_as_it_was_written(folder: Path) -> None:
    assert read_package(folder).manifest.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("num_hidden_layers", 5),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
        ("weights_sha256", "0" * 64),
        ("block_size", 1),
        ("block_size", 32),
        ("num_blocks", 9),
        ("beyond", "dense"),
        ("beyond", "error"),
        ("topology_sha256", "0" * 64),
    ],
)
def test_an_edited_number_is_refused(folder: Path, name: str, value: object) -> None:
    edited(folder, **{name: value})
    with pytest.raises(PackageError, match=r"manifest\.json|kernels"):
        read_package(folder)


def test_covered_layers_are_the_topologys(folder: Path) -> None:
    manifest = read_package(folder).manifest
    kernels = tuple(
        dataclasses.replace(kernel, layers=tuple(3 if layer == 2 else layer for layer in kernel.layers))
        for kernel in manifest.kernels
    )
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, layers=(0, 1, 3), kernels=kernels).to_json())
    with pytest.raises(PackageError, match=r"manifest\.json: layers: expected \[0, 1, 2\], as topology\.json has it"):
        read_package(folder)


def test_layers_with_equal_heads_share_a_schedule(folder: Path) -> None:
    manifest = read_package(folder).manifest
    swap = {(0, 2): (1, 2), (1,): (0,)}
    kernels = tuple(dataclasses.replace(kernel, layers=swap[kernel.layers]) for kernel in manifest.kernels)
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, kernels=kernels).to_json())
    with pytest.raises(PackageError, match=r"as for a layer with the same heads in topology\.json, got 'attention_00"):
        read_package(folder)


def test_another_kernels_symbol_is_refused(folder: Path) -> None:
    manifest = read_package(folder).manifest
    kernels = (dataclasses.replace(manifest.kernels[0], symbol="surgeon_attention_001"), *manifest.kernels[1:])
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, kernels=kernels).to_json())
    with pytest.raises(PackageError, match=r"kernels\[0\]\.symbol: expected 'surgeon_attention_000', got 'surgeon_"):
        read_package(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected a topology with layers"),
        ("{}", "expected a topology with layers"),
        ('{"layers": 3}', "expected a topology with layers"),
        ('{"layers": [], "model": 3}', "manifest.json: model.model_type: expected None, as topology.json has it"),
    ],
)
def test_a_topology_whose_hash_agrees_but_that_is_none(folder: Path, text: str, words: str) -> None:
    manifest: Manifest = dataclasses.replace(
        read_package(folder).manifest, topology_sha256=hashlib.sha256(text.encode()).hexdigest()
    )
    with pytest.raises(PackageError, match=words):
        check_topology(text.encode(), manifest, "kernels")
