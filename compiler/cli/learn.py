"""`surgeon learn`: the arguments' values become a topology file."""

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from surgeon.compiler.learn.learn import Request, learn
from surgeon.compiler.learn.measure.checkpoint import read_model
from surgeon.compiler.learn.measure.text import read_text
from surgeon.compiler.learn.patterns.to_topology import write_topology
from surgeon.compiler.learn.ultrametric.descent import Settings
from surgeon.compiler.system.main_process import is_first
from surgeon.compiler.system.terminal import progress_bar, quiet_unless_watched
from surgeon.compiler.topology.topology import Topology, mean_density
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.evaluate.processes import joined


def run(arguments: argparse.Namespace) -> Iterable[str]:
    """Learns and writes the topology; returns the lines to print.

    Raises:
        ModelError: the model or a text cannot be used.
        TopologyError: a length or density cannot be had, or the file cannot be written.
    """
    started = time.perf_counter()
    request = Request(
        density=arguments.density,
        length=arguments.length,
        block_size=arguments.block,
        method=arguments.method,
        seed=arguments.seed,
        measured_length=arguments.measured_length,
        cuts=arguments.cuts,
        settings=Settings(steps=arguments.steps, batch=arguments.batch, arity=arguments.arity),
    )
    out: Path = arguments.out
    # Before the work and not after it: that it cannot be written.
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise TopologyError(str(out), "a file to write", "a folder", "name a file, for instance topology.json")
    work: Path = arguments.work or out.with_name(out.name + ".steps")
    quiet_unless_watched()
    with joined():
        model, tokenizer = read_model(arguments.model, arguments.device_map)
        texts = [read_text(path, tokenizer) for path in arguments.text]
        with progress_bar() as progress:
            topology = learn(model, texts, request, work=work, progress=progress)
    if is_first():
        write_topology(topology, out)
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return _lines(topology, out, time.perf_counter() - started, arguments.json)


def _lines(topology: Topology, out: Path, seconds: float, as_json: bool) -> Iterable[str]:
    density = mean_density(topology)
    if as_json:
        made = {"path": str(out), "topology_sha256": topology.sha256, "density": density, "seconds": round(seconds, 3)}
        return (json.dumps(made | {"provenance": dict(topology.provenance)}),)
    lines = [f"{out}: {topology.provenance['method']}, {density:.1%} of the blocks, {seconds:.0f} s"]
    if figures := topology.provenance.get("validation"):
        lines.append(
            f"KL divergence from the dense model on validation text: {figures['divergence']:.4f} nats a token,"
            f" equal windows {figures['equal_windows']:.4f}"
        )
    return lines
