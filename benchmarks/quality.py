"""What a model would do under an explicit mask, and how that agrees with what it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.compiler.topology import Topology

_CHUNK = 512


def token_mask(topology: Topology, layer: int, length: int) -> torch.Tensor:
    """Which tokens each token sees, from the topology's definition: bool `[1, heads, length, length]`."""
    size = topology.block_size
    blocks = torch.from_numpy(topology.block_mask(layer, -(-length // size)))
    tokens = blocks.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)[:, :length, :length]
    return (tokens & torch.ones(length, length, dtype=torch.bool).tril())[None]


@contextmanager
def explicit_mask(model: PreTrainedModel, topology: Topology) -> Iterator[None]:
    """Runs the model's own attention under the topology, written out as a mask for each layer and head.

    This is the reference that compiled kernels are compared with: it shares no code with them. Every sequence must
    start at its first position and be passed whole, without padding or cache.
    """

    def hook(layer: int) -> Any:
        def replace(
            _module: Any, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            length = named["hidden_states"].shape[1]
            return arguments, named | {"attention_mask": token_mask(topology, layer, length)}

        return replace

    layers: Any = model.base_model.layers
    handles = [
        block.self_attn.register_forward_pre_hook(hook(index), with_kwargs=True) for index, block in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Agreement:
    """How a model predicts one sequence beside the dense one, in nats a token.

    `divergence` is the mean KL divergence of the dense model's distribution from this one's, `dense_loss` and `loss`
    are their mean negative log-likelihoods, `same_first` is the share of tokens at which both hold the same likeliest.
    """

    divergence: float
    dense_loss: float
    loss: float
    same_first: float


@torch.inference_mode()
def last_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The last hidden states of one sequence `[1, length]`: `[length, hidden]`."""
    states: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return states


@torch.inference_mode()
def agreement(model: PreTrainedModel, dense: torch.Tensor, sparse: torch.Tensor, tokens: torch.Tensor) -> Agreement:
    """Compares two last hidden states `[length, hidden]` of a sequence `[1, length]`, by the model's own head."""
    head, targets = model.get_output_embeddings(), tokens[0, 1:, None]
    sums, count = torch.zeros(4, dtype=torch.float64), targets.numel()
    parts = (states[:-1].split(_CHUNK) for states in (dense, sparse))
    for dense_part, part, wanted in zip(*parts, targets.split(_CHUNK), strict=True):
        expected, found = (torch.log_softmax(head(states).float(), dim=-1) for states in (dense_part, part))
        sums[0] += torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
        sums[1] -= expected.gather(1, wanted).sum()
        sums[2] -= found.gather(1, wanted).sum()
        sums[3] += (expected.argmax(dim=-1) == found.argmax(dim=-1)).sum()
    return Agreement(*(sums / count).tolist())
