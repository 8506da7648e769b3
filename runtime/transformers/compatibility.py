"""Checks that a kernel package fits a model, all made before anything is changed."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgeon.runtime.errors import PatchError, TargetError, short_repr
from surgeon.runtime.loading import Package
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.transformers.fingerprint import are_weights, weights_id
from surgeon.runtime.transformers.layers import (
    FULL,
    IMPLEMENTATIONS,
    computed_dtypes,
    find_attention,
    layer_of,
    layer_type,
    own_attention,
)
from surgeon.runtime.transformers.offload import has_own_weights, running_device

_OPTIONS = {
    "cpu": {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"},
    "cuda": {torch.bfloat16: "bf16", torch.float16: "fp16"},
}
"""The values of --dtype, by device and dtype."""


@dataclass(frozen=True)
class LeftLayer:
    """A layer that keeps the model's own attention, because of its type or because the topology does not cover it."""

    layer: int
    layer_type: str

    @property
    def reason(self) -> str:
        """The reason, in a few words."""
        return "not covered by the topology" if self.layer_type == FULL else self.layer_type


def check_fit(model: torch.nn.Module, package: Package) -> tuple[LeftLayer, ...]:
    """Checks that the full-attention layers of the model are those that the package was compiled for.

    Returns the layers that must keep the model's own attention.

    Raises:
        PatchError: the model is not a Transformers model with exchangeable attention, has another shape, has no layer
            for the kernels, does more than causal softmax attention in its full-attention layers, is on a device or in
            a dtype without kernels, or has other weights than the topology's model.
    """
    if not isinstance(model, PreTrainedModel):
        raise PatchError(
            type(model).__name__,
            "a PreTrainedModel of Transformers",
            f"a {type(model).__module__}.{type(model).__qualname__}",
            "pass the model itself, before torch.compile and without a wrapper around it",
        )
    if not getattr(type(model), "_supports_attention_backend", False):
        raise PatchError(
            type(model).__name__,
            "a model whose attention goes through Transformers' AttentionInterface",
            "one with its own attention",
            "use a model type from the table in runtime/README.md, with this version of Transformers",
        )
    shape = package.manifest.model
    check_config(model.config, shape)
    left = _left_layers(model, package)
    _check_sites(model, shape)
    _check_kernels(model, package, {layer.layer for layer in left})
    expected = shape.weights_sha256
    if expected is not None and not are_weights(model, expected):
        raise PatchError(
            "weights",
            f"those that the topology was learned on, SHA-256 {expected}",
            weights_id(model),
            "load those weights, in any dtype, or set model.weights_sha256 to null, for any weights, and compile again",
        )
    return left


def check_config(config: PreTrainedConfig, shape: ModelShape) -> None:
    """Checks that a model of this config has the shape that a package was compiled for, and causal softmax attention.

    Raises:
        PatchError: it has not.
    """
    _check_shape(config, shape)
    _check_attention(config)


def _check_shape(config: PreTrainedConfig, shape: ModelShape) -> None:
    heads = getattr(config, "num_attention_heads", None)
    found = {
        "model_type": config.model_type,
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None),
    }
    for name, value in found.items():
        if value != getattr(shape, name):
            raise PatchError(
                f"model.config.{name}",
                f"{getattr(shape, name)!r}, as the package was compiled for",
                short_repr(value),
                "patch the model that the topology was learned on",
            )


def _check_attention(config: PreTrainedConfig) -> None:
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        raise PatchError(
            "model.config.attn_logit_softcapping",
            "scores that enter the softmax unchanged, so None",
            short_repr(cap),
            "this model cannot be patched: no kernel caps scores",
        )
    if getattr(config, "output_attentions", False):
        raise PatchError(
            "model.config.output_attentions", "False: kernels keep no attention weights", "True", "set it to False"
        )
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        raise PatchError("model.config", "causal attention", "bidirectional", "patch a causal language model")


def _left_layers(model: PreTrainedModel, package: Package) -> tuple[LeftLayer, ...]:
    types = _layer_types(model.config)
    covered = package.manifest.layers
    left = tuple(
        LeftLayer(layer, layer_type)
        for layer, layer_type in enumerate(types)
        if layer_type != FULL or layer not in covered
    )
    if len(left) == len(types):
        raise PatchError(
            type(model).__name__,
            f"full attention in one of the layers {short_repr(covered)} that the package covers",
            ", ".join(sorted(set(types))),
            "learn a topology for the layers of full attention; if no sequence will be longer than the window, load "
            "the model with sliding_window=None",
        )
    implementation = model.config._attn_implementation
    for name, module in find_attention(model):
        if layer_of(module) in {layer.layer for layer in left} and not own_attention(module, implementation):
            raise PatchError(
                f"{name}, which keeps its attention",
                f"one of {', '.join(IMPLEMENTATIONS)}",
                short_repr(implementation),
                "call model.set_attn_implementation with one of these, or cover every layer",
            )
    return left


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return [layer_type(config, layer) for layer in range(config.num_hidden_layers)]


def _check_sites(model: PreTrainedModel, shape: ModelShape) -> None:
    types = _layer_types(model.config)
    full = [layer for layer, layer_type in enumerate(types) if layer_type == FULL]
    found = find_attention(model)
    layers = [layer_of(module) for _, module in found]
    if [layer for layer in layers if layer not in range(len(types)) or layer in full] != full:
        raise PatchError(
            type(model).__name__,
            f"one attention module for each of the layers {short_repr(full)}, in order",
            f"those of the layers {short_repr(layers)}",
            "patch the whole model, with all its layers",
        )
    for name, module in found:
        if layer_of(module) in full:
            _check_site(name, module, model.config, shape)
        elif getattr(module, "sliding_window", None) is None:
            raise PatchError(
                f"{name}.sliding_window",
                f"the window of a layer that model.config calls {types[layer_of(module)]!r}",
                "none",
                "this model ignores its own layer types, and cannot be patched",
            )


def _check_site(name: str, module: torch.nn.Module, config: PreTrainedConfig, shape: ModelShape) -> None:
    if not module.is_causal:
        raise PatchError(f"{name}.is_causal", "True", "False", "patch a causal language model")
    if getattr(module, "config", None) is not config:
        raise PatchError(
            f"{name}.config", "the model's own config", "another object", "build the model from one config"
        )
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    for attribute, value in (("sliding_window", window), ("sinks", getattr(module, "sinks", None))):
        if value is not None:
            raise PatchError(
                f"{name}.{attribute}",
                "full causal attention, so None",
                short_repr(value),
                "this model cannot be patched",
            )
    for attribute in ("head_dim", "qk_head_dim", "v_head_dim"):
        size = getattr(module, attribute, shape.head_dim)
        if size != shape.head_dim:
            raise PatchError(
                f"{name}.{attribute}",
                f"{shape.head_dim}, as the package was compiled for",
                short_repr(size),
                "this model cannot be patched: its heads differ",
            )


def _check_kernels(model: PreTrainedModel, package: Package, left: set[int]) -> None:
    for name, module in find_attention(model):
        if layer_of(module) in left:
            continue
        devices = {running_device(part) for part in module.modules() if has_own_weights(part)}
        for device, dtypes in [(device, _dtypes_on(device, name, package)) for device in devices]:
            _check_dtypes(model, name, dtypes, device)


def _dtypes_on(device: torch.device, name: str, package: Package) -> set[torch.dtype]:
    """The dtypes that the package runs on the device of the attention module `name`."""
    if device.type not in ("cpu", "cuda"):
        raise PatchError(name, "weights on the CPU or a GPU", str(device), 'call model.to("cpu"), or load the weights')
    try:
        dtypes = set(package.dtypes_on(device))
    except TargetError as error:
        raise PatchError(
            f"{name} on {device}", error.expected, error.got, f"move the model, or {error.remedy}"
        ) from error
    if not package.strict and torch.float32 in dtypes:
        dtypes |= {torch.bfloat16, torch.float16}  # the package runs them in float32, and logs that
    return dtypes


def _check_dtypes(model: PreTrainedModel, name: str, dtypes: set[torch.dtype], device: torch.device) -> None:
    for path, dtype in computed_dtypes(model, name):
        if dtype not in dtypes:
            option = _OPTIONS[device.type].get(dtype)
            compiled = f", or compile the package with --dtype {option}" if option else ""
            raise PatchError(
                path,
                f"queries, keys and values in {' or '.join(sorted(map(str, dtypes)))}, as the package's kernels",
                str(dtype),
                f"load the model in such a dtype{compiled}",
            )
