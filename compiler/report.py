"""`surgeon report`: a pilot and the topology it tried, as one HTML page that needs nothing beside itself."""

import json
from dataclasses import dataclass
from pathlib import Path

from surgeon.compiler.folders import write_file
from surgeon.compiler.inspection import Pattern, pattern_of
from surgeon.compiler.pilot_table import pilot_rows, verdict
from surgeon.compiler.read import read_topology
from surgeon.compiler.report_figures import Figure, dendrogram_figures, density_map, mask_figures, pilot_figures
from surgeon.compiler.schedule import schedule_layers
from surgeon.compiler.templates import render_template
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import PilotError
from surgeon.runtime.pilot_results import Pilot, read_pilot


@dataclass(frozen=True)
class Fact:
    """A line of the report's provenance."""

    name: str
    value: str


def write_report(pilot: Path, topology: Path, out: Path) -> int:
    """Reads both files, writes the page, and returns its size in bytes.

    Raises:
        PilotError: the pilot's file breaks its format, or is of another topology.
        TopologyError: the topology's file breaks its format.
    """
    page = report(read_pilot(pilot), read_topology(topology))
    write_file(out, page)
    return len(page.encode())


def report(pilot: Pilot, topology: Topology) -> str:
    """The page, the same for the same pilot and topology.

    Raises:
        PilotError: the pilot is of another topology.
    """
    patched = next((column for column in pilot.columns if column.name == "patched"), None)
    if patched is None or patched.topology_sha256 != topology.sha256:
        raise PilotError(
            "topology",
            f"the topology {patched and patched.topology_sha256} that the pilot tried",
            topology.sha256,
            "name the topology that the package was compiled from",
        )
    layers = schedule_layers(topology)
    pattern = pattern_of(topology, layers)
    trees, left_out = dendrogram_figures(topology)
    sections: dict[str, tuple[Figure, ...]] = {
        "figures": pilot_figures(pilot),
        "density": (density_map(pattern.density),),
        "dendrograms": trees,
        "masks": mask_figures(topology, layers, pattern.density),
    }
    return render_template(
        "report/page.html.jinja",
        pilot=pilot,
        rows=pilot_rows(pilot),
        verdict=verdict(pilot),
        left_out=left_out,
        patched=patched,
        facts=_facts(pilot, topology, pattern),
        **sections,
    )


def _facts(pilot: Pilot, topology: Topology, pattern: Pattern) -> tuple[Fact, ...]:
    model, machine = topology.model, pilot.machine
    facts = [
        Fact("model", pilot.model),
        Fact("weights", pilot.weights_sha256),
        Fact(
            "shape",
            f"{model.model_type}, {model.num_hidden_layers} layers, {model.num_attention_heads} heads, "
            f"{model.num_key_value_heads} KV heads, head size {model.head_dim}",
        ),
        Fact("topology", topology.sha256),
        Fact("blocks", f"{pattern.num_blocks} of {pattern.block_size} tokens, beyond: {pattern.beyond}"),
        Fact("package", pilot.package_id),
        *(Fact("text", f"{text.name}, {text.sequences} sequences, SHA-256 {text.sha256}") for text in pilot.texts),
        Fact("machine", f"{machine.processor}, {machine.device}, {machine.threads} threads, {machine.dtype}"),
        Fact("versions", f"torch {machine.torch}, transformers {machine.transformers}"),
        Fact("date", f"{machine.date}, {pilot.seconds:.0f} s"),
    ]
    learned = [
        Fact(f"learned: {key}", value if isinstance(value, str) else json.dumps(value))
        for key, value in topology.provenance.items()
    ]
    return (*facts, *learned)
