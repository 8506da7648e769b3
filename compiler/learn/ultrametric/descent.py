"""Trains block digits by gradient descent on the divergence from the dense model, which stays frozen."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore, Tensors
from surgeon.compiler.learn.measure.decoder import dense_states, pull_masks
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.windows import window_floor, window_patterns
from surgeon.compiler.learn.ultrametric.digits import Sample, collapsed_logits, hard_digits, sample
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.pairs import causal_pairs
from surgeon.runtime.evaluate.processes import Processes, processes_of

_RATE = 0.3
_MOMENTS = (0.9, 0.95)
_SAVED_EVERY = 5


@dataclass(frozen=True)
class Settings:
    """Settings of the training: temperature falls geometrically; noise and penalties ramp up over the first half.

    A step averages over `batch` sequences.
    """

    steps: int = 60
    batch: int = 1
    arity: int = 2
    hot: float = 1.0
    cold: float = 0.3
    density_weight: float = 20.0
    balance_weight: float = 0.05

    def temperature(self, step: int) -> float:
        """The digits' temperature at a step."""
        return float(self.hot * (self.cold / self.hot) ** (step / max(self.steps - 1, 1)))

    def ramp(self, step: int) -> float:
        """The ramp at a step: 0 at the first, 1 from the middle on."""
        return min(1.0, 2 * step / max(self.steps, 1))


@dataclass(frozen=True)
class Trained:
    """The trained pattern, which may see more than was requested, and every step's divergence in nats per token."""

    pattern: Pattern
    divergences: tuple[float, ...]


def train_digits(
    model: PreTrainedModel,
    sequences: Sequence[torch.Tensor],
    grid: Grid,
    shape: tuple[int, int],
    settings: Settings,
    seed: int,
    store: CheckpointStore,
    identity: dict[str, object],
    progress: Progress | None = None,
) -> Trained:
    """Learns paths and cuts for a model of `shape` (layers, heads); every window has the floor's size.

    If torch.distributed has several processes, they share the sequences of each step, so a batch of one is the work of
    one process. The main process keeps the steps.

    Raises:
        TopologyError: the density is out of reach.
    """
    window = window_floor(grid.blocks, grid.sink, grid.density)
    always = window_patterns(grid.blocks, grid.sink)[window - 1]
    processes = processes_of(model)
    # "schedule" is the older name of the settings, kept here so that steps kept by older versions are found.
    described_grid = {name: getattr(grid, name) for name in ("block_size", "blocks", "sink", "density")}
    described = {**identity, "grid": described_grid, "schedule": dataclasses.asdict(settings), "seed": seed}
    logits = torch.stack([collapsed_logits(shape[1], grid.blocks, settings.arity) for _ in range(shape[0])])
    state: Tensors = {"logits": logits, "cuts": torch.zeros(shape), "divergences": torch.zeros(0)}
    for begin in range(0, settings.steps, _SAVED_EVERY):
        end = min(begin + _SAVED_EVERY, settings.steps)
        chunk = [
            [sequences[(step * settings.batch + item) % len(sequences)] for item in range(settings.batch)]
            for step in range(begin, end)
        ]
        if progress is not None:
            lately = f", {float(state['divergences'][-1]):.4f} nats a token" if begin else ""
            progress(f"descending the KL divergence{lately}", begin, settings.steps)
        read = [tokens[0].tolist() for batch in chunk for tokens in batch]
        named = {"step": "ultrametric", "tokens": read, "begin": begin} | described
        # All continue from what the main process finds, or all descend: none may be left waiting for others' gradients.
        found = processes.first(partial(store.find, named))
        if found is None:
            started = time.process_time()
            reached = _descend(model, chunk, grid, settings, seed, always, processes, state, begin)
            (seconds,) = processes.totals((time.process_time() - started,))
            found = processes.first(partial(store.keep, named, reached, seconds))
        state = found
    return Trained(_pattern(state["logits"], state["cuts"], window), tuple(state["divergences"].tolist()))


def masks_at(state: Tensors, settings: Settings, step: int, seed: int, always: torch.Tensor) -> list[Sample]:
    """Draws the samples of all layers at a step, reproducibly for a seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    temperature, noise = settings.temperature(step), settings.ramp(step)
    return [
        sample(logits, cuts, always, temperature, noise, generator)
        for logits, cuts in zip(state["logits"], state["cuts"], strict=True)
    ]


def _descend(
    model: PreTrainedModel,
    batches: Sequence[Sequence[torch.Tensor]],
    grid: Grid,
    settings: Settings,
    seed: int,
    always: torch.Tensor,
    processes: Processes,
    before: Tensors,
    begin: int,
) -> Tensors:
    learned = {name: before[name].clone().requires_grad_() for name in ("logits", "cuts")}
    adam = torch.optim.Adam(learned.values(), lr=_RATE, betas=_MOMENTS)
    if begin:
        for name, parameter in learned.items():
            adam.state[parameter] = {
                "step": torch.tensor(float(begin)),
                "exp_avg": before[f"{name}.mean"].clone(),
                "exp_avg_sq": before[f"{name}.square"].clone(),
            }
    divergences = before["divergences"].tolist()
    for step, batch in enumerate(batches, start=begin):
        samples = masks_at(learned, settings, step, seed, always)
        masks = torch.stack([found.masks for found in samples])
        visible = masks.sum()
        density = visible / (causal_pairs(grid.blocks) * learned["cuts"].numel())
        excess = torch.relu(density - grid.density) / (1 - grid.density)
        balance = torch.stack([found.balance for found in samples]).mean()
        penalty = settings.ramp(step) * (settings.density_weight * excess**2 + settings.balance_weight * balance)
        pulls = processes.share(len(batch), partial(_pull, model, batch, masks))
        divergence, gradient = 0.0, torch.zeros_like(masks)
        for found, pull in pulls:
            divergence += found / len(batch)
            gradient += pull / len(batch)
        adam.zero_grad()
        torch.autograd.backward([masks, penalty], [gradient, torch.ones_like(penalty)])
        adam.step()
        divergences.append(divergence)
        with torch.no_grad():
            learned["cuts"].clamp_(0, before["logits"].shape[3] - 1)
    after: Tensors = {"divergences": torch.tensor(divergences)}
    for name, parameter in learned.items():
        after[name] = parameter.detach()
        after[f"{name}.mean"] = adam.state[parameter]["exp_avg"]
        after[f"{name}.square"] = adam.state[parameter]["exp_avg_sq"]
    return after


def _pull(
    model: PreTrainedModel, batch: Sequence[torch.Tensor], masks: torch.Tensor, item: int
) -> tuple[float, torch.Tensor]:
    return pull_masks(model, batch[item], dense_states(model, batch[item]), masks)


def _pattern(logits: torch.Tensor, cuts: torch.Tensor, window: int) -> Pattern:
    """The pattern given by the hard digits and the rounded cuts."""
    paths = hard_digits(logits).argmax(dim=-1)
    found = {
        place: Cut(
            Dendrogram.from_paths(paths[place].tolist(), logits.shape[-1], f"head {place[0]}.{place[1]}"),
            float(cuts[place].round()),
        )
        for place in np.ndindex(cuts.shape)
    }
    return Pattern(np.full(cuts.shape, window, dtype=np.int64), found)
