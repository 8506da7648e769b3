"""The committed pilots passed, and belong to the committed topologies."""

from pathlib import Path

import pytest

import pilot
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime.evaluate.pilot_file import read_pilot


def test_the_page_is_about_the_sparsest_topology() -> None:
    densities = [mean_density(read_topology(pilot.topology_file(name))) for name in pilot.TOPOLOGIES]
    assert densities == sorted(densities)


@pytest.mark.parametrize("file", sorted(pilot.RESULTS.glob("pilot-*.json")), ids=lambda file: str(file.stem))
def test_a_committed_pilot_passed_and_is_of_the_topology_that_lies_here(file: Path) -> None:
    found = read_pilot(file)
    assert found.passed
    assert len(found.thresholds) >= 2
    topology = read_topology(pilot.topology_file(file.stem.removeprefix("pilot-")))
    dense, patched, window = map(found.column, ("dense", "patched", "window"))
    assert dense is not None
    assert patched is not None
    assert window is not None
    assert patched.topology_sha256 == topology.sha256
    assert window.density == pytest.approx(patched.density, abs=0.01)
    assert len(dense.losses) == 12
