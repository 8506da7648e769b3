"""From a frozen model and texts to a topology: what each method does, in order."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from surgeon.compiler.learn.budget import Grid, Learned, learn_windows
from surgeon.compiler.learn.emit import mean_density, scaled, window_topology
from surgeon.compiler.learn.journal import Journal
from surgeon.compiler.learn.models import check_decoder, frozen, model_shape
from surgeon.compiler.learn.text import TokenText, divide
from surgeon.compiler.learn.windows import uniform_windows
from surgeon.compiler.progress import Progress
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.fingerprints import fingerprint

METHODS = ("budget", "window")


@dataclass(frozen=True)
class Request:
    """What to learn. Density is visible pairs over causal pairs of blocks; lengths and blocks are in tokens.

    `measured_length` is the length of the sequences that are learned on; windows are scaled from it to `length`.
    """

    density: float
    length: int
    block_size: int = 64
    method: str = "budget"
    seed: int = 0
    sink: int = 1
    measured_length: int | None = None


@dataclass(frozen=True)
class Effort:
    """Sequences of each text: to measure costs on, to validate on, and fresh ones for each round of refinement."""

    calibrate: int = 2
    validate: int = 1
    refine: tuple[int, ...] = (1, 1, 1)


def learn(
    model: PreTrainedModel,
    texts: Sequence[TokenText],
    request: Request,
    effort: Effort | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Topology:
    """Learns a topology for a frozen model; its weights are not touched.

    `work` is a folder that keeps finished steps: a run that finds its steps there continues, with the same result.

    Raises:
        ModelError: the model is no decoder with full attention, or a text holds too few sequences.
        TopologyError: a length is no multiple of the block, or the density is out of reach.
    """
    check_decoder(model)
    blocks, measured = _blocks(request, request.length), _blocks(request, request.measured_length or request.length)
    started, started_cpu = time.perf_counter(), time.process_time()
    weights = fingerprint(model)
    provenance: dict[str, Any] = {
        "method": request.method,
        "model": model.config.name_or_path or type(model).__name__,
        "weights_sha256": weights,
        "requested_density": request.density,
    }
    if request.method == "window":
        shape = model_shape(model)
        windows = uniform_windows(
            shape.num_hidden_layers, shape.num_attention_heads, blocks, request.sink, request.density
        )
        topology = window_topology(shape, request.block_size, blocks, request.sink, windows, provenance)
        return _with_provenance(topology, {"density": round(mean_density(topology), 5)})

    effort = effort or Effort()
    grid = Grid(request.block_size, measured, request.sink, request.density)
    sequences = divide(
        texts, measured * request.block_size, effort.calibrate, effort.validate, effort.refine, request.seed
    )
    journal = Journal(work)
    with frozen(model):
        learned = learn_windows(model, sequences, grid, request.seed, journal, {"weights": weights}, progress)
    topology = window_topology(
        model_shape(model), request.block_size, measured, request.sink, learned.windows, provenance
    )
    if blocks != measured:
        topology = scaled(topology, blocks)
    return _with_provenance(
        topology,
        {
            "seed": request.seed,
            "density": round(mean_density(topology), 5),
            "measured_length": measured * request.block_size,
            "texts": [{"name": text.name, "sha256": text.sha256, "tokens": len(text.tokens)} for text in texts],
            "sequences": {
                "calibrate": len(sequences.calibrate),
                "validate": len(sequences.validate),
                "refine": [len(fresh) for fresh in sequences.refine],
            },
            **_figures(learned),
            "steps": {"computed": journal.computed, "found": journal.found},
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - started_cpu, 1),
        },
    )


def _blocks(request: Request, length: int) -> int:
    if length < request.block_size or length % request.block_size:
        raise TopologyError(
            "--length",
            f"a multiple of the block, {request.block_size} tokens",
            str(length),
            "choose another length or block",
        )
    return length // request.block_size


def _figures(learned: Learned) -> dict[str, Any]:
    return {
        "validation": {
            "divergence": learned.divergence,
            "equal_windows": learned.uniform_divergence,
            "ratio": round(learned.divergence / learned.uniform_divergence, 4) if learned.uniform_divergence else None,
        },
        "windows": {"least": int(np.min(learned.windows)), "most": int(np.max(learned.windows))},
        "rounds": [dataclasses.asdict(step) for step in learned.rounds],
    }


def _with_provenance(topology: Topology, more: dict[str, Any]) -> Topology:
    return dataclasses.replace(topology, provenance={**topology.provenance, **more})
