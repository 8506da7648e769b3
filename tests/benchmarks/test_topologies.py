"""The topologies that the project ships: they can be read, fit the model, and have exact schedules."""

import importlib.resources
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import learn
from schedules import block_mask
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import DenseHead, SparseHead
from surgeon.runtime.package.manifest import ModelShape

FOLDER = Path(__file__).parents[2] / "benchmarks" / "topologies"
FILES = sorted(FOLDER.glob("*.json"))
TREES = FOLDER / "smollm2-135m-trees.json"
WEIGHTS = "77d8d98246181009f37a107558f8870a8d9f5f3bac29b83d59f6ad0283335862"
"""The identity of SmolLM2-135M's weights; with the model, tests/test_smollm2.py compares it."""
QWEN = ModelShape("qwen2", 24, 14, 2, 64, "0da68f17fc0e5d92dadc098de2229698590d06786e400c8c6ada8824d5e0da8f")
"""The shape of Qwen2.5-Coder-0.5B, with the identity of its weights."""

BLOCKS = {case.name: case.block for case in learn.CASES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_topology_is_valid_and_of_the_models_shape(file: Path) -> None:
    schema = importlib.resources.files("surgeon.compiler.topology").joinpath("topology.schema.json").read_text("utf-8")
    Draft202012Validator(json.loads(schema)).validate(json.loads(file.read_text()))
    topology = read_topology(file)
    qwen = file.stem.startswith("qwen")
    assert topology.model == (QWEN if qwen else ModelShape("llama", 30, 9, 3, 64, WEIGHTS))
    assert topology.block_size == BLOCKS.get(file.stem, 64)
    assert topology.provenance["method"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_topology_is_scheduled_exactly(file: Path) -> None:
    topology = read_topology(file)
    for index, layer in enumerate(schedule_layers(topology)):
        for length in (topology.num_blocks, topology.num_blocks + 40):
            expanded = np.stack([block_mask(head, length) for head in layer.heads])
            np.testing.assert_array_equal(expanded, topology.block_mask(index, length))


LEARNED = [file.stem for file in FILES if file != TREES]


@pytest.mark.parametrize("name", LEARNED)
def test_the_learned_topologies_have_the_density_that_they_claim(name: str) -> None:
    topology = read_topology(FOLDER / f"{name}.json")
    density = np.mean([topology.density(layer) for layer in range(len(topology.layers))])
    assert density == pytest.approx(topology.provenance["density"], abs=1e-4)
    share = next(part for part in name.split("-") if part.isdigit())
    assert share == f"{100 * density:.0f}", "a file is named after the density that it has"


def test_the_trees_are_what_their_script_makes() -> None:
    script = runpy.run_path(str(FOLDER / "make_trees.py"))
    assert TREES.read_text(encoding="utf-8") == script["spelled"](script["document"]()) + "\n"


def test_the_trees_are_of_every_kind() -> None:
    topology = read_topology(TREES)
    heads = [head for layer in topology.layers for head in layer]
    sparse = [head for head in heads if isinstance(head, SparseHead)]
    assert DenseHead() in heads
    assert {head.dendrogram for head in sparse} == set(range(len(topology.dendrograms)))
    for index, tree in enumerate(topology.dendrograms):
        cuts = {head.cut for head in sparse if head.dendrogram == index}
        assert len(cuts - {0.0}) > 1
        clusters = [cluster for cut in cuts for cluster in tree.clusters(cut)]
        contiguous = all(cluster[-1] - cluster[0] == len(cluster) - 1 for cluster in clusters)
        assert contiguous == (index in (0, 4)), f"dendrograms[{index}]"
    assert {tree["arity"] for tree in json.loads(TREES.read_text())["dendrograms"] if "paths" in tree} == {2, 3}
    assert TREES.stat().st_size < 60_000
