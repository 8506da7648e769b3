"""Whether a kernel package fits a model: every question is asked before anything is touched."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgeon.runtime import sites
from surgeon.runtime.errors import PatchError, TargetError, shown
from surgeon.runtime.fingerprints import fingerprint
from surgeon.runtime.loading import Package
from surgeon.runtime.manifest import ModelShape


def check_fit(model: torch.nn.Module, package: Package) -> None:
    """Checks that every attention site of the model is one that the package was compiled for.

    Raises:
        PatchError: it is no Transformers model with exchangeable attention, has another shape, does more than full
            causal attention, stands on a device or in a dtype without kernels, or has other weights than the
            topology's.
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
            "one with an attention of its own",
            "use a Llama of this Transformers version",
        )
    shape = package.manifest.model
    _check_shape(model.config, shape)
    _check_config(model.config)
    _check_sites(model, shape)
    _check_kernels(model, package)
    expected = shape.weights_sha256
    if expected is not None and (got := fingerprint(model)) != expected:
        raise PatchError(
            "weights",
            f"those that the topology was learned on, SHA-256 {expected}",
            got,
            "load those weights, in the dtype they had then, or set model.weights_sha256 to null and compile again",
        )


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
                shown(value),
                "patch the model that the topology was learned on",
            )


def _check_config(config: PreTrainedConfig) -> None:
    for name in ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "output_attentions"):
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise PatchError(
                f"model.config.{name}", "full causal attention, so None", shown(value), "this model cannot be patched"
            )
    if getattr(config, "is_causal", True) is False:
        raise PatchError("model.config.is_causal", "True", "False", "patch a causal language model")
    layer_types = getattr(config, "layer_types", None) or ()
    for layer, layer_type in enumerate(layer_types):
        if layer_type != "full_attention":
            raise PatchError(
                f"model.config.layer_types[{layer}]",
                "'full_attention'",
                shown(layer_type),
                "this model cannot be patched",
            )


def _check_sites(model: PreTrainedModel, shape: ModelShape) -> None:
    found = sites.find(model)
    layers = [module.layer_idx for _, module in found]
    if layers != list(range(shape.num_hidden_layers)):
        raise PatchError(
            type(model).__name__,
            f"one attention module for each of layers 0..{shape.num_hidden_layers - 1}, in order",
            f"those of layers {shown(layers)}",
            "patch the whole model, with all its layers",
        )
    for name, module in found:
        if not module.is_causal:
            raise PatchError(f"{name}.is_causal", "True", "False", "patch a causal language model")
        if getattr(module, "config", None) is not model.config:
            raise PatchError(
                f"{name}.config", "the model's own config", "another object", "build the model from one config"
            )
        for attribute in ("sliding_window", "sinks"):
            value = getattr(module, attribute, None)
            if value is not None:
                raise PatchError(
                    f"{name}.{attribute}",
                    "full causal attention, so None",
                    shown(value),
                    "this model cannot be patched",
                )


def _check_kernels(model: PreTrainedModel, package: Package) -> None:
    for name, module in sites.find(model):
        for weight in module.parameters():
            if weight.device.type not in ("cpu", "cuda"):
                raise PatchError(
                    name, "weights on the CPU or a GPU", str(weight.device), 'call model.to("cpu"), or load the weights'
                )
            try:
                dtypes = set(package.dtypes_on(weight.device))
            except TargetError as error:
                raise PatchError(
                    f"{name} on {weight.device}", error.expected, error.got, f"move the model, or {error.remedy}"
                ) from error
            if not package.strict and torch.float32 in dtypes:
                dtypes |= {torch.bfloat16, torch.float16}  # the package runs them in float32, and says so
            if weight.dtype not in dtypes:
                raise PatchError(
                    name,
                    f"weights in {' or '.join(sorted(str(dtype) for dtype in dtypes))}, as the package's kernels",
                    str(weight.dtype),
                    "load the model in that dtype, or compile the package with this one (--dtype)",
                )
