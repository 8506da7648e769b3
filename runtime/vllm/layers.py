"""The layers of a server that run on a package's kernels: found, checked against these, and reported."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package
from surgeon.runtime.vllm.compatibility import covered_layers
from surgeon.runtime.vllm.serving import Serving

_LOG = init_logger("vllm.surgeon")


@dataclass(frozen=True)
class Covered:
    """The layers of a group that the package covers, by name: their indices and attention, and this process's heads."""

    package: Package
    indices: Mapping[str, int]
    layers: Mapping[str, Attention]


def covered_by(found: Serving, config: Any, names: list[str], spec: Any, implementation: type[Any]) -> Covered | None:
    """Finds and checks the layers, of those of these names, that run on the package's kernels; None if none do.

    `spec` is that of the group's cache, and `implementation` the plugin's class of a layer's attention.

    Raises:
        PatchError: a layer's attention or its cache is not what the kernels take.
    """
    layers = get_layers_from_vllm_config(config, Attention, names)
    manifest = found.package.manifest
    covered = covered_layers(config.model_config.hf_config, manifest)
    indices = {name: extract_layer_index(name) for name in layers if extract_layer_index(name) in covered}
    if not indices:
        return None
    heads = manifest.model.num_key_value_heads // get_tensor_model_parallel_world_size()
    if spec.block_size % manifest.block_size or spec.num_kv_heads != heads:
        raise PatchError(
            "vLLM's pages",
            f"{heads} KV heads and a multiple of {manifest.block_size} tokens",
            f"{spec.num_kv_heads} KV heads and {spec.block_size} tokens",
            "serve with another --block-size",
        )
    for name in indices:
        check_layer(name, layers[name], manifest.model.head_dim, implementation)
    rank = get_tensor_model_parallel_rank()
    part = found.package.part(range(rank * heads, (rank + 1) * heads))
    return Covered(part, indices, {name: layers[name] for name in indices})


def check_layer(name: str, layer: Attention, head_dim: int, implementation: type[Any]) -> None:
    """Refuses a layer, covered by the package, whose attention is not what the kernels compute.

    Raises:
        PatchError: it is another kind of attention.
    """
    impl: Any = layer.impl
    if not isinstance(impl, implementation):
        raise PatchError(f"{name}: backend", "the plugin's", type(impl).__name__, "serve this model without a package")
    expected: dict[str, tuple[object, object]] = {
        "sliding_window": (layer.sliding_window, None),
        "logits_soft_cap": (impl.logits_soft_cap or None, None),
        "alibi_slopes": (impl.alibi_slopes, None),
        "sinks": (impl.sinks, None),
        "kv_sharing_target_layer_name": (layer.kv_sharing_target_layer_name, None),
        "attn_type": (AttentionType(layer.attn_type).value, AttentionType.DECODER.value),
        "head_size": (layer.head_size, head_dim),
        "head_size_v": (layer.head_size_v, head_dim),
    }
    for what, (got, wanted) in expected.items():
        if (got is None) != (wanted is None) or (wanted is not None and got != wanted):
            raise PatchError(f"{name}: {what}", str(wanted), str(got), "serve this model without a package")


def check_sharing(every: Mapping[str, Attention], ours: Container[str]) -> None:
    """Refuses a layer that reads the cache of one of ours, where its pages have another order than vLLM's.

    Raises:
        PatchError: there is one.
    """
    for name, layer in every.items():
        if (target := layer.kv_sharing_target_layer_name) in ours:
            raise PatchError(
                f"{name}: kv_sharing_target_layer_name",
                "a layer with a cache of its own",
                f"one that reads the cache of {target}",
                "serve this model without a package",
            )


def report(found: Serving, config: Any, kernels: str) -> None:
    """Logs once, in one line, which of a process's layers run on which kernels, named by `kernels`."""
    if get_tensor_model_parallel_rank() != 0:
        return
    layers = sorted(map(extract_layer_index, get_layers_from_vllm_config(config, Attention)))
    covered = covered_layers(config.model_config.hf_config, found.package.manifest)
    package, options = found.package, found.options
    ours, own = ([layer for layer in layers if (layer in covered) == is_ours] for is_ours in (True, False))
    kernels = f"{kernels} kernels of package {package.id[:12]}, recall {options.recall}"
    asking = f", the last {options.dense_rows} tokens of a prompt read everything" if options.asking else ""
    parts = [f"layers {_ranges(ours)} run on {kernels}{asking}"] if ours else []
    parts += [f"layers {_ranges(own)} on vLLM's own"] if own else []
    _LOG.info_once("surgeon: " + "; ".join(parts))


def _ranges(numbers: Sequence[int]) -> str:
    ends: list[list[int]] = []
    for number in numbers:
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
