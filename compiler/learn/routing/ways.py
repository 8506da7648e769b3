"""Chooses between ways to route a topology: by the divergence on text that nothing was learned on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.runs import Runs
from surgeon.compiler.learn.routing.choosing import attending_as
from surgeon.compiler.learn.routing.key_ranges import measure_routers
from surgeon.compiler.learn.routing.retrieve import Retrieval
from surgeon.compiler.learn.routing.routed import converted, lengthened, routed_heads
from surgeon.compiler.learn.texts.text import Sequences
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.router import LayerRouter
from surgeon.compiler.topology.topology import Topology

WINDOWS = "windows"
"""The way without routes."""


@dataclass(frozen=True)
class Routed:
    """The topology that diverges least of those that may be taken, and all divergences in nats a token, by way.

    A way is `WINDOWS`, or names the tokens of a routed head's window.
    """

    topology: Topology
    way: str
    divergences: Mapping[str, float]

    def figures(self, retrieval: Retrieval | None) -> dict[str, Any]:
        """The figures of its routes for a topology's provenance."""
        found = {"heads": routed_heads(self.topology), "way": self.way, "validation": dict(self.divergences)}
        if retrieval is None:
            return found
        return found | {"documents": retrieval.documents, "agreement_of_halves": round(retrieval.agreement, 3)}


def routed(
    model: PreTrainedModel,
    runs: Runs,
    windows: Topology,
    retrieval: Retrieval | None,
    density: float,
    near_tokens: Sequence[int],
    sequences: Sequences,
    progress: Progress | None,
) -> Routed:
    """Routes the heads of a topology of windows, in the way that follows the dense model best.

    `near_tokens` are the numbers of tokens that may stay a routed head's window. Where heads were found to retrieve,
    they get the windows that this takes first, and are routed in any case; the windows alone, at the density, are then
    measured for comparison. Otherwise routes have to be better than windows.

    Raises:
        TopologyError: heads have clusters, or the density does not hold the windows of heads that retrieve.
    """
    routers = measure_routers(model, sequences.calibrate, progress)
    if retrieval is None:
        return best_way(runs, windows, windows, routers, near_tokens, sequences.validate, may_stay=True)
    alone = lengthened(windows, frozenset(), density)
    enough = lengthened(windows, retrieval.places, density)
    return best_way(runs, alone, enough, routers, near_tokens, sequences.validate, may_stay=False)


def best_way(
    runs: Runs,
    windows: Topology,
    routable: Topology,
    routers: Sequence[LayerRouter],
    near_tokens: Sequence[int],
    sequences: Sequence[torch.Tensor],
    may_stay: bool,
) -> Routed:
    """Validates `windows`, and `routable` with its windows converted, and takes the best way; windows if they may stay.

    What is validated is how the sequences `[1, length]` are read, which may be shorter than the topologies are long.

    Raises:
        TopologyError: heads have clusters.
    """
    near = {f"{tokens} near": converted(routable, routers, tokens) for tokens in near_tokens}
    ways = {WINDOWS: windows} | {way: made for way, made in near.items() if made.router is not None}
    found = {
        way: runs.validate_attention(attending_as(made), {"topology": made.sha256}, sequences, f"routes, {way}")
        for way, made in ways.items()
    }
    allowed = [way for way in ways if may_stay or way != WINDOWS]
    best = min(allowed, key=lambda way: found[way]) if allowed else WINDOWS
    return Routed(ways[best], best, found)
