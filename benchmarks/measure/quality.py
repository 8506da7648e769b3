"""A model under an explicit mask: the reference for compiled kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.compiler.topology.topology import Topology


def token_mask(topology: Topology, layer: int, length: int) -> torch.Tensor:
    """The tokens that each token sees, by the topology's definition, bool `[1, heads, length, length]`."""
    size = topology.block_size
    blocks = torch.from_numpy(topology.block_mask(layer, -(-length // size)))
    tokens = blocks.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)[:, :length, :length]
    return (tokens & torch.ones(length, length, dtype=torch.bool).tril())[None]


@contextmanager
def explicit_mask(model: PreTrainedModel, topology: Topology) -> Iterator[None]:
    """Runs the model's own attention under the topology, written out as a mask for each layer and head.

    This is the reference for compiled kernels, and shares no code with them. Every sequence must start at its first
    position and be passed whole, without padding or cache.
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
