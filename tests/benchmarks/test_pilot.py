"""The committed pilots belong to the committed topologies, and those that are recommended passed."""

import re
from pathlib import Path

import pytest

import pilot
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime.evaluate.pilot.pilot_file import read_pilot


def test_the_page_is_about_the_sparsest_topology() -> None:
    densities = [mean_density(read_topology(pilot.topology_file(name))) for name in pilot.TOPOLOGIES]
    assert densities == sorted(densities)


@pytest.mark.parametrize("file", sorted(pilot.RESULTS.glob("pilot-*.json")), ids=lambda file: str(file.stem))
def test_a_committed_pilot_is_of_the_topology_that_lies_here(file: Path) -> None:
    found = read_pilot(file)
    assert found.weights_unchanged
    assert len(found.thresholds) >= 2
    name = re.sub("-at-[0-9]+$", "", file.stem.removeprefix("pilot-"))
    topology = read_topology(pilot.topology_file(name))
    dense, patched, window = map(found.column, ("dense", "patched", "window"))
    assert dense is not None
    assert patched is not None
    assert patched.topology_sha256 == topology.sha256
    asked = pilot.measured_of(pilot.checkpoint_of(name), found.length)
    assert len(dense.losses) == 2 * int(asked[asked.index("--sequences") + 1])
    assert (window is None) == ("--no-window" in asked)
    if window is not None:
        assert window.density == pytest.approx(patched.density, abs=0.01)


def test_a_quarter_of_the_blocks_passed_and_forgets_by_the_pattern_alone() -> None:
    found = read_pilot(pilot.RESULTS / "pilot-smollm2-135m-25-answers.json")
    assert found.passed
    alone = found.column("pattern")
    assert alone is not None
    worst = alone.beside_dense("worst_retrieval")
    assert worst is not None
    assert worst.value < 0.5


def test_a_tenth_of_the_blocks_passed_and_finds_nearly_what_dense_finds() -> None:
    found = read_pilot(pilot.RESULTS / "pilot-smollm2-135m-10-answers.json")
    assert found.passed
    patched = found.column("patched")
    assert patched is not None
    worst = patched.beside_dense("worst_retrieval")
    assert worst is not None
    assert worst.value >= 0.95
