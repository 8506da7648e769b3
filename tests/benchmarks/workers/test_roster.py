"""Who is timed: each has a worker that takes its settings, and what the committed results hold is about them."""

import ast
import json
from pathlib import Path

import pytest

from surgeon.compiler import read_topology
from surgeon.compiler.topology.topology import Topology
from workers import roster as rostered
from workers.figures import RESULTS
from workers.roster import FOR_ANSWERS, TOPOLOGIES, Peer, roster

WORKERS = Path(rostered.__file__).parents[1]


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Peer]:
    monkeypatch.setattr(rostered, "compile_package", lambda topology, out: out)
    return roster(tmp_path, tmp_path / "model.gguf", 2, 8192)


def test_a_worker_takes_the_settings_of_its_peers(peers: dict[str, Peer]) -> None:
    """Their modules are read, not imported: their libraries are in environments of their own."""
    for name, peer in peers.items():
        file = WORKERS / f"{peer.module.replace('.', '/')}.py"
        tree = ast.parse(file.read_text(encoding="utf-8"))
        (load,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "load")
        taken = [argument.arg for argument in load.args.args]
        needed = taken[: len(taken) - len(load.args.defaults)]
        assert set(needed) <= set(peer.settings) <= set(taken), name
        assert json.loads(json.dumps(peer.settings)) == peer.settings, name


def test_vllm_alone_runs_in_its_environment(peers: dict[str, Peer]) -> None:
    assert {name for name, peer in peers.items() if peer.in_vllm} == {"vllm-fp32", "vllm-bf16"}


@pytest.mark.parametrize(("length", "name"), FOR_ANSWERS.items())
def test_each_length_has_its_topology(length: int, name: str) -> None:
    topology: Topology = read_topology(TOPOLOGIES / f"{name}.json")
    assert topology.num_blocks * topology.block_size == length


@pytest.mark.parametrize("file", sorted(RESULTS.glob("peers-*.json")), ids=lambda file: str(file.stem))
def test_committed_results_are_of_this_roster(file: Path, peers: dict[str, Peer]) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["length"] in FOR_ANSWERS
    assert not set(result["peers"]) & set(result["left_out"])
    assert set(result["peers"]) | set(result["left_out"]) <= set(peers)
    for name, peer in result["peers"].items():
        assert (peer["title"], peer["linear"]) == (peers[name].title, peers[name].linear)
