"""Makes the page of `surgeon report`: a pilot and the topology it tried, as one self-contained HTML page."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.compiler.package.inspection import TopologySummary, summary_of
from surgeon.compiler.pilot.pilot_charts import density_figures, retrieval_figures
from surgeon.compiler.pilot.svg import Figure
from surgeon.compiler.pilot.table import Table, density_table, pilot_table, retrieval_table, verdict
from surgeon.compiler.pilot.topology_charts import dendrogram_figures, density_map, mask_figures
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.system.atomic_files import write_file
from surgeon.compiler.system.jinja import render_template
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import PilotError
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot, read_pilot


@dataclass(frozen=True)
class Fact:
    """One line of the report's provenance."""

    name: str
    value: str


def write_report(pilot: Path, topology: Path, out: Path, beside: Sequence[Path] = ()) -> int:
    """Reads the files, writes the page, and returns its size in bytes.

    Raises:
        PilotError: a pilot's file violates its format, or belongs to another topology or cannot be compared.
        TopologyError: the topology's file violates its format.
    """
    others = [(str(path), read_pilot(path)) for path in beside]
    page = report(read_pilot(pilot), read_topology(topology), others)
    write_file(out, page)
    return len(page.encode())


def report(pilot: Pilot, topology: Topology, beside: Sequence[tuple[str, Pilot]] = ()) -> str:
    """Renders the page, the same for the same input; `beside` holds more pilots for the curves, by name in errors.

    Raises:
        PilotError: the pilot is for another topology, or one of the others cannot be compared with it.
    """
    patched = _patched(pilot)
    if patched.topology_sha256 != topology.sha256:
        raise PilotError(
            "topology",
            f"the topology {patched.topology_sha256} that the pilot tried",
            topology.sha256,
            "name the topology that the package was compiled from",
        )
    _check_beside(pilot, beside)
    pilots = (pilot, *(other for _, other in beside))
    layers = schedule_layers(topology)
    summary = summary_of(topology, layers)
    trees, left_out = dendrogram_figures(topology)
    sections: dict[str, tuple[Figure, ...]] = {
        "figures": density_figures(pilots) if beside else (),  # with one density the table says it all
        "depths": retrieval_figures(pilot),
        "density": (density_map(summary.density),),
        "dendrograms": trees,
        "masks": mask_figures(topology, layers, summary.density),
    }
    return render_template(
        "pilot/page.html.jinja",
        pilot=pilot,
        table=pilot_table(pilot),
        retrieval=retrieval_table(pilot) if pilot.questions else None,
        points=_others(pilots) if beside else None,
        verdict=verdict(pilot),
        left_out=left_out,
        patched=patched,
        facts=_facts(pilots, topology, summary),
        **sections,
    )


def _others(pilots: Sequence[Pilot]) -> Table:
    """The table of the other pilots: the first one's models have a table of their own."""
    table = density_table(pilots)
    shown = density_table(pilots[:1]).rows
    return Table(table.heads, tuple(row for row in table.rows if row not in shown))


def _patched(pilot: Pilot, where: str = "pilot") -> Column:
    for column in pilot.columns:
        if column.name == "patched":
            return column
    raise PilotError(f"{where}: columns", "a patched model", "none", "run surgeon pilot again")


def _check_beside(pilot: Pilot, beside: Sequence[tuple[str, Pilot]]) -> None:
    """Checks that the pilots on one page differ in nothing but the topology."""
    wanted = _terms(pilot)
    tried = {_patched(pilot).topology_sha256}
    for where, other in beside:
        for name, found in _terms(other, where).items():
            if found != wanted[name]:
                remedy = "run surgeon pilot on the same model and texts, in the same way, on the same machine"
                raise PilotError(f"{where}: {name}", f"{wanted[name]}, as in the first pilot", found, remedy)
        sha256 = _patched(other, where).topology_sha256
        if sha256 in tried:
            raise PilotError(f"{where}: topology", "another than the other pilots'", f"{sha256} again", "leave one out")
        tried.add(sha256)


def _terms(pilot: Pilot, where: str = "pilot") -> dict[str, str]:
    """The conditions that pilots must have in common, in words."""
    tasks = Counter(f"{each.task} in {each.length} tokens" for each in pilot.questions)
    return {
        "weights": f"{pilot.weights_sha256}, {'unchanged' if pilot.weights_unchanged else 'CHANGED'}",
        "length": f"{pilot.length} tokens",
        "texts": ", ".join(f"{text.sequences} sequences of {text.sha256}" for text in pilot.texts),
        "tasks": ", ".join(f"{count} of {task}" for task, count in tasks.items()) or "none",
        "recall": _recall(_patched(pilot, where)),
        "machine": _machine(pilot),
    }


def _machine(pilot: Pilot) -> str:
    machine = pilot.machine
    return (
        f"{machine.processor}, {machine.device}, {machine.threads} threads, {machine.dtype}, "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )


def _recall(patched: Column) -> str:
    return f"{patched.recall}, {patched.dense_rows} dense rows"


def _run(pilot: Pilot) -> str:
    patched = _patched(pilot)
    return (
        f"{patched.density:.1%}, topology {patched.topology_sha256}, package {pilot.package_id}, "
        f"{pilot.machine.date}, {pilot.seconds:.0f} s"
    )


def _facts(pilots: Sequence[Pilot], topology: Topology, summary: TopologySummary) -> tuple[Fact, ...]:
    pilot, *beside = pilots
    model = topology.model
    facts = [
        Fact("model", pilot.model),
        Fact("weights", pilot.weights_sha256),
        Fact(
            "shape",
            f"{model.model_type}, {model.num_hidden_layers} layers, {model.num_attention_heads} heads, "
            f"{model.num_key_value_heads} KV heads, head size {model.head_dim}",
        ),
        Fact("topology", topology.sha256),
        Fact("blocks", f"{summary.num_blocks} of {summary.block_size} tokens, beyond: {summary.beyond}"),
        Fact("package", pilot.package_id),
        *(Fact("text", f"{text.name}, {text.sequences} sequences, SHA-256 {text.sha256}") for text in pilot.texts),
        Fact("machine", _machine(pilot)),
        Fact("recall", _recall(_patched(pilot))),
        Fact("date", f"{pilot.machine.date}, {pilot.seconds:.0f} s"),
        *(Fact("beside", _run(other)) for other in beside),
    ]
    learned = [
        Fact(f"learned: {key}", value if isinstance(value, str) else json.dumps(value))
        for key, value in topology.provenance.items()
    ]
    return (*facts, *learned)
