"""Tiny random models for tests, and the same models under a topology's masks, written out in full."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import Package
from topologies import build, dense_topology, head, one_cluster_topology, window_head

Model = TypeVar("Model", bound=PreTrainedModel)

VOCABULARY = 97
SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 32, "block_size": 16, "num_blocks": 4}
"""The part of a topology that describes the tiny model; it covers 64 tokens, fewer than the tests' sequences have."""


@dataclass(frozen=True)
class Compiled:
    """A topology and its package, loaded."""

    topology: Topology
    package: Package


def tiny_config(**changes: Any) -> LlamaConfig:
    """Three layers, four heads of size 32, two KV heads; weights are so large that attention decides the next token."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return LlamaConfig(**(shape | changes))


def tiny_llama(config: LlamaConfig | None = None, seed: int = 0) -> LlamaForCausalLM:
    """A random model in fp32, the same for the same seed, ready for inference."""
    torch.manual_seed(seed)
    return cast(LlamaForCausalLM, LlamaForCausalLM(tiny_config() if config is None else config).eval())


def collapsed_topologies() -> dict[str, Topology]:
    """Two topologies that leave the model as it is: every head dense, and every head one cluster."""
    shape = {"num_layers": 3, "num_heads": 4, **SHAPE}
    return {"dense": dense_topology(**shape), "one cluster": one_cluster_topology(**shape)}


def sparse_topology(**changes: Any) -> Topology:
    """A topology with different heads in every layer: a window, scattered clusters, a sink, a dense one in the last."""
    scattered = {"linkage": [[0, 2, 1.0, 2], [1, 3, 2.0, 2], [4, 5, 3.0, 4]]}
    digits = {"paths": [[0, 0], [1, 2], [1, 0], [0, 1]], "arity": 3}
    layers = [
        [head(), head(sink=1), head(0, 1.0), head(1, 1.0, window=2)],
        [head(0, 2.0), head(1, 0.0, sink=1), head(window=3), head()],
        [head(1, 1.0, sink=1), {"dense": True}, head(), head(0, 1.0, window=2)],
    ]
    return build(layers, [scattered, digits], **(SHAPE | changes))


def routed_topology() -> Topology:
    """A topology with heads that choose blocks by content in the first two of three layers."""
    heads = [window_head(1, 1, route=2), window_head(1, 2), window_head(0, 1), window_head(0, 2, route=1)]
    others = [window_head(1, 2), window_head(0, 1)]
    return build([heads, others + heads[:2], others + others], **SHAPE)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids `[batch, length]`, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: Sequence[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of sequences of these lengths, padded on the left to the longest."""
    ids = tokens(len(lengths), max(lengths), seed)
    column = torch.arange(max(lengths))
    mask = (column >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def masked_model(model: Model, topology: Topology, dense_rows: int = 0) -> Model:
    """A copy of the model with plain softmax attention under `topology.block_mask`, which a patched model must equal.

    Rows of blocks that end after a call's last query minus `dense_rows` tokens see everything, if there are any.
    Sliding layers, and those that the topology does not cover, have the model's own mask.
    """
    AttentionInterface.register("explicit_mask", _explicit_attention)
    AttentionMaskInterface.register("explicit_mask", _full_mask)
    masked = copy.deepcopy(model)
    masked.config._attn_implementation = "explicit_mask"
    for module in masked.modules():
        if hasattr(module, "layer_idx"):
            sliding = getattr(module, "sliding_window", None) is not None
            module.topology = None if sliding or module.layer_idx not in topology.covered else topology
            module.dense_rows = dense_rows
    return masked


def _full_mask(**arguments: Any) -> torch.Tensor:
    mask = sdpa_mask(**(arguments | {"allow_is_causal_skip": False}))
    assert mask is not None
    return mask


def _explicit_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    seen = attention_mask
    if module.topology is not None:
        layer, dense_rows = module.layer_idx, module.dense_rows
        seen = torch.cat([_visible(module.topology, layer, mask[0], dense_rows) for mask in attention_mask])
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)  # padding sees nothing
    return (weights @ value).transpose(1, 2).contiguous(), None


def _visible(topology: Topology, layer: int, causal: torch.Tensor, dense_rows: int) -> torch.Tensor:
    """Makes a mask, bool `[1, heads, queries, keys]`, from a sequence's causal mask with padding `[queries, keys]`."""
    keys = torch.arange(causal.shape[1])
    own = (causal * keys).amax(dim=1)  # the last key that a query sees is its own
    first = int(causal.any(dim=0).long().argmax())
    query_block, key_block = ((index - first).clamp(min=0) // topology.block_size for index in (own, keys))
    blocks = torch.from_numpy(topology.block_mask(layer, int(query_block.max()) + 1))
    seen = blocks[:, query_block][:, :, key_block.clamp(max=blocks.shape[2] - 1)]
    if dense_rows:
        end = int(own.max()) - first + 1
        seen = seen | ((query_block + 1) * topology.block_size > end - dense_rows)[:, None]
    return (seen & causal)[None]


def attributes(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The contents of every module of a model, by name, to compare before and after calls that must not change it."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}
