"""The location of a model's weights: one device, or wherever a `device_map` put them: devices, CPU memory or disk.

Offloaded weights are on the meta device until accelerate's hooks fetch them, for one call of their module.

Source: accelerate's AlignDevicesHook, which each module of a model with a `device_map` has.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.runtime.errors import ModelError


def running_device(module: torch.nn.Module) -> torch.device:
    """The device on which a module with weights computes, which quantised layers may hold as buffers."""
    device = getattr(_hook(module), "execution_device", None)
    return next(_tensors(module)).device if device is None else torch.device(device)


def has_own_weights(module: torch.nn.Module) -> bool:
    """True if the module itself, not just a part of it, holds weights."""
    return next(_tensors(module, recurse=False), None) is not None


def entry_device(model: PreTrainedModel) -> torch.device:
    """The device where token ids must be, and where logits are returned."""
    return running_device(model.get_input_embeddings())


def is_offloaded(model: torch.nn.Module) -> bool:
    """True if some weights are fetched only when they are used."""
    return any(parameter.is_meta for parameter in model.parameters())


def fetched(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter of this name, fetched from wherever it was offloaded to.

    Raises:
        ModelError: the parameter is on the meta device and nowhere else.
    """
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    path, _, own = name.rpartition(".")
    kept = getattr(_hook(module.get_submodule(path)), "weights_map", None)
    if kept is None:
        raise ModelError(name, "a parameter in memory", "one on the meta device", "load the model's weights first")
    weight: torch.Tensor = kept[own]
    return weight


def weight_stores(model: torch.nn.Module) -> list[Any]:
    """The maps from which the hooks of a model's modules fetch weights, and those in which they keep tied weights."""
    names = ("weights_map", "tied_params_map")
    stores = (getattr(_hook(module), name, None) for module in model.modules() for name in names)
    return [store for store in stores if store is not None]


def _tensors(module: torch.nn.Module, recurse: bool = True) -> Iterator[torch.Tensor]:
    return chain(module.parameters(recurse), module.buffers(recurse))


def _hook(module: torch.nn.Module) -> Any:
    return getattr(module, "_hf_hook", None)
