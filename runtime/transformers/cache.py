"""A Transformers cache that drops, per KV head, the blocks that no later token reads.

Source: `transformers.cache_utils`, Cache.
"""

import os
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package, loaded
from surgeon.runtime.transformers.layers import FULL, layer_type
from surgeon.runtime.transformers.paged_layer import PagedLayer

_OUTPUTS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _OUTPUTS else "past_key_values"
"""The name of a model's cache among its arguments and outputs: "cache" from Transformers 5.24 on."""


class SurgeonCache(Cache):
    """A cache for a model patched with the package, on the CPU; pass it to `generate` with `**cache.argument`.

    It drops something only if the model was patched with `recall="pattern"`; under "dense", rows that ask read
    everything, so that it keeps everything, and says so once. A patched model computes with it, bit for bit, what it
    computes with a DynamicCache. Layers that no kernel runs are
    kept as a DynamicCache keeps them; the model's `config` is needed if some layers are not full attention. Once blocks
    are dropped, the cache cannot be cropped back to a row that reads them, unless `activate_past_recording` was called
    first, as assisted generation does.

    Raises:
        PatchError: the config belongs to another model.
        TargetError: the package has no kernels for the CPU.
        PackageError: the package does not say when blocks may be dropped.
    """

    def __init__(self, package: Package | str | os.PathLike[str], config: PreTrainedConfig | None = None) -> None:
        package = loaded(package)
        package.prepare("cpu")
        number = package.manifest.model.num_hidden_layers
        layers: list[Any] = DynamicCache(config=config).layers if config else [DynamicLayer() for _ in range(number)]
        if len(layers) != number:
            raise PatchError(
                "SurgeonCache: config", f"{number} layers", str(len(layers)), "pass the model's own config"
            )
        for layer, liveness in package.liveness().items():
            if config is None or layer_type(config, layer) == FULL:
                layers[layer] = PagedLayer(package, layer, liveness)
        super().__init__(layers=layers)

    @property
    def argument(self) -> dict[str, "SurgeonCache"]:
        """The cache as a keyword argument, under the name that this version of Transformers gives it."""
        return {CACHE_NAME: self}

    def kept_bytes(self) -> int:
        """Bytes that keys and values take, including spare slots and block tables."""
        return sum(layer.kept_bytes() if isinstance(layer, PagedLayer) else _whole(layer) for layer in self.layers)

    def full_bytes(self) -> int:
        """Bytes that keys and values would take in a DynamicCache."""
        return sum(layer.full_bytes() if isinstance(layer, PagedLayer) else _whole(layer) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, a number given as zero or negative, from all layers or none.

        Raises:
            PatchError: the number is positive, or a block that the next token reads has been dropped.
        """
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


def _whole(layer: object) -> int:
    """The bytes of a layer that is kept whole."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(int(tensor.nbytes) for tensor in tensors if isinstance(tensor, torch.Tensor))
