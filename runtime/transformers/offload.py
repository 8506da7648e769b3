"""Where a model's weights are: on one device, or where a `device_map` put them: on several, in CPU memory, on disk.

Weights that are offloaded lie on the meta device until accelerate's hooks fetch them, for one call of their module.

Source: accelerate's AlignDevicesHook, which each of a spread model's modules has.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.runtime.errors import ModelError


def running_device(module: torch.nn.Module) -> torch.device:
    """The device that a module with weights of its own computes on."""
    device = getattr(_hook(module), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def entry_device(model: PreTrainedModel) -> torch.device:
    """The device that token ids belong on, and that logits come back to."""
    return running_device(model.get_input_embeddings())


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether some weights are fetched only when they are used."""
    return any(parameter.is_meta for parameter in model.parameters())


def fetched(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter by its name, fetched from where it was offloaded to.

    Raises:
        ModelError: it is on the meta device and nowhere else.
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
    """What the hooks of a model's modules fetch weights from, and what they keep tied ones in."""
    names = ("weights_map", "tied_params_map")
    stores = (getattr(_hook(module), name, None) for module in model.modules() for name in names)
    return [store for store in stores if store is not None]


def _hook(module: torch.nn.Module) -> Any:
    return getattr(module, "_hf_hook", None)
