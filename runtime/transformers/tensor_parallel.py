"""Tensor parallelism: the KV heads of a model's attention that are in this process.

Under a tensor-parallel plan, each process has an equal share of consecutive rows of the query, key and value weights,
and calls the attention function with plain tensors of its own heads. The config keeps the numbers of the whole model.

Source: `transformers.distributed.tensor_parallel`, the styles "colwise" and "colwise_gather_output".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard

from surgeon.runtime.errors import PatchError
from surgeon.runtime.package.manifest import ModelShape

_MESH_DIMENSION = "tp"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Split:
    """The split of a weight's rows: this process has part `rank` of `ranks`; a single part is the whole."""

    rank: int
    ranks: int


def local_kv_heads(found: Sequence[tuple[str, torch.nn.Module]], shape: ModelShape) -> range:
    """The KV heads that the attention modules `found` hold in this process; all of them if nothing is split.

    The output of a fused projection of queries, keys and values is gathered, so that each process holds all heads.

    Raises:
        PatchError: the heads are not split equally, or modules are split differently.
    """
    splits = {name: _split_of(name, module, shape) for name, module in found}
    first, split = next(iter(splits.items()), ("", _Split(0, 1)))
    for name, other in splits.items():
        if other != split:
            raise PatchError(
                name,
                f"heads split over {split.ranks} processes, as those of {first}",
                f"over {other.ranks}",
                'load the model with tp_plan="auto"',
            )
    each = shape.num_key_value_heads // split.ranks
    return range(split.rank * each, (split.rank + 1) * each)


def is_sharded(model: torch.nn.Module) -> bool:
    """True if a weight of the model is sharded over processes."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def _split_of(name: str, module: torch.nn.Module, shape: ModelShape) -> _Split:
    projections = {child: found for child, found in module.named_children() if child in _PROJECTIONS}
    splits = {child: _rows_of(f"{name}.{child}", projection) for child, projection in projections.items()}
    if not any(split.ranks > 1 for split in splits.values()):
        return _Split(0, 1)
    query = splits.get("q_proj")
    for child, split in splits.items():
        if split != query:
            raise PatchError(
                f"{name}.{child}",
                "weights split over the processes like q_proj's, so that each has whole KV heads",
                f"one of {split.ranks} parts, and one of {query.ranks if query else 1} of q_proj's",
                'load the model with tp_plan="auto"',
            )
    (split,) = set(splits.values())
    if shape.num_key_value_heads % split.ranks:
        raise PatchError(
            name,
            f"a number of processes that divides the {shape.num_key_value_heads} KV heads",
            f"{split.ranks} processes, which would split a KV head",
            f"start {_divisors(shape.num_key_value_heads)} processes",
        )
    return split


def _rows_of(where: str, projection: torch.nn.Module) -> _Split:
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, DTensor):
        return _Split(0, 1)
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if _MESH_DIMENSION not in names:
        return _Split(0, 1)  # sharded in another way, and whole again when used
    dimension = names.index(_MESH_DIMENSION)
    placement = weight.placements[dimension]
    if placement.is_replicate() or mesh.size(dimension) == 1:
        return _Split(0, 1)
    if not isinstance(placement, Shard) or placement.dim != 0:
        raise PatchError(
            where, "weights split by rows (colwise) or whole", str(placement), 'load the model with tp_plan="auto"'
        )
    return _Split(mesh.get_local_rank(dimension), mesh.size(dimension))


def _divisors(heads: int) -> str:
    return " or ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
