"""The committed results: read from `results/`, and what they say of themselves in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inputs.checkpoints import SMOLLM2_135M, Checkpoint
from surgeon.compiler import Topology, read_topology
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot, read_pilot

RESULTS = Path(__file__).parent / "results"
TOPOLOGIES = Path(__file__).parent / "topologies"

Row = Mapping[str, Any]


def read(name: str) -> Row:
    """The contents of `results/<name>.json`."""
    result: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def suite(name: str) -> Row:
    """The results of a suite of `bench.py` on every instruction that a processor has."""
    return read(f"{name}-native")


def answers_of(length: int) -> list[Row]:
    """The rows of SmolLM2-135M's windows of this length that were learned for answers, the densest first."""
    rows: list[Row] = read("answers")["rows"]
    found = [row for row in rows if row["model"] == SMOLLM2_135M.name and not row["heads_with_a_cut"]]
    return sorted((row for row in found if row["length"] == length), key=lambda row: -float(row["density"]))


def for_answers(topology: str) -> Row:
    """The row of a topology that was learned for answers."""
    rows: dict[str, Row] = {row["topology"]: row for row in read("answers")["rows"]}
    return rows[topology]


def pilots_of(recall: str = "dense", checkpoint: Checkpoint = SMOLLM2_135M) -> list[Pilot]:
    """A model's pilots under a recall, each at its topology's own length, the densest first."""
    files = RESULTS.glob(f"pilot-{checkpoint.title.lower()}-*.json")
    found = [read_pilot(file) for file in files if "-at-" not in file.stem]
    return sorted(
        (pilot for pilot in found if column_of(pilot, "patched").recall == recall),
        key=lambda pilot: -column_of(pilot, "patched").density,
    )


def column_of(pilot: Pilot, name: str) -> Column:
    """A pilot's column of this name, which committed pilots have."""
    column = pilot.column(name)
    assert column is not None, f"a committed pilot has a column {name}"
    return column


def topology_of(column: Column) -> Topology:
    """The committed topology that a column was measured with."""
    return next(
        topology
        for topology in map(read_topology, TOPOLOGIES.glob("*.json"))
        if topology.sha256 == column.topology_sha256
    )


def share(row: Row) -> str:
    """The density of a row, in words."""
    return f"{row['density']:.0%} of the blocks"


def visible(column: Column) -> str:
    """The density of a column, in words."""
    return f"{column.density:.0%} of the blocks"


def lengths_of(pilot: Pilot, word: str) -> str:
    """The lengths of the prompts that numbers are hidden in."""
    return f" {word} ".join(f"{length:,}" for length in sorted({each.length for each in pilot.questions}))


def processor(row: Row) -> str:
    """The processor of a result and the instructions that torch used."""
    return f"{row['machine']['processor'].replace('(R)', '')}, {row['machine']['torch_isa']}"
