"""The router of a model: where the keys of each KV head and channel lie, measured on text."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.decoder import observe_keys
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.router import Channels, LayerRouter

_DEVIATIONS = 3.0  # on either side of the mean; the few keys beyond count as the farthest


def measure_routers(
    model: PreTrainedModel, sequences: Sequence[torch.Tensor], progress: Progress | None = None
) -> tuple[LayerRouter, ...]:
    """The router of every layer, from the keys of the dense model on sequences `[1, length]`.

    Keys are those that attention gets, after rotary embedding.
    """
    sums: dict[int, torch.Tensor] = {}  # [3, KV heads, head_dim]: numbers, sums, sums of squares

    def observe(layer: int, keys: torch.Tensor) -> None:
        wide = keys.double()
        found = torch.stack([torch.ones_like(wide).sum(1), wide.sum(1), (wide**2).sum(1)]).cpu()
        sums[layer] = sums.get(layer, 0) + found

    for number, tokens in enumerate(sequences):
        if progress is not None:
            progress("measuring the ranges of keys", number, len(sequences))
        observe_keys(model, tokens, observe)
    routers = []
    for layer in sorted(sums):
        count, total, squares = sums[layer]
        centre = total / count
        scale = _DEVIATIONS * (squares / count - centre**2).clamp(min=0).sqrt()
        routers.append(LayerRouter(_rounded(centre), _rounded(scale.clamp(min=1e-6))))
    return tuple(routers)


def _rounded(numbers: torch.Tensor) -> Channels:
    """Numbers of five digits: finer ones would not change which block is chosen, only the size of the file."""
    return tuple(tuple(float(f"{number:.4e}") for number in row) for row in numbers.tolist())
