"""Puts compiled attention into a Transformers model and takes it out again."""

import logging
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgeon.runtime.errors import PatchError
from surgeon.runtime.loading import Package, loaded
from surgeon.runtime.transformers.attention import Site, bind, is_bound, register, release
from surgeon.runtime.transformers.compatibility import LeftLayer, check_fit
from surgeon.runtime.transformers.config_view import close_view, open_view
from surgeon.runtime.transformers.layers import FULL, IMPLEMENTATIONS, find_attention, layer_of, layer_type
from surgeon.runtime.transformers.recall import (
    DENSE,
    DENSE_ROWS,
    forget_prompt_ends,
    note_prompt_ends,
    recall_of,
    rows_that_ask,
)
from surgeon.runtime.transformers.tensor_parallel import local_kv_heads

_ATTRIBUTE = "_surgeon_patch"
_LOG = logging.getLogger("surgeon")


@dataclass(frozen=True)
class _Patch:
    """The record for `unpatch`: the config and its view, the module attributes that hold it, and the bound modules."""

    config: PreTrainedConfig
    view: PreTrainedConfig
    holders: tuple[tuple[torch.nn.Module, str], ...]
    bound: tuple[torch.nn.Module, ...]


def patch(
    model: PreTrainedModel,
    package: Package | str | os.PathLike[str],
    recall: str | None = None,
    dense_rows: int = DENSE_ROWS,
) -> tuple[LeftLayer, ...]:
    """Makes the model's full attention run on the package's kernels, in place; the weights are not touched.

    With `recall` "dense", the rows that ask read everything: the last `dense_rows` tokens of a call, by whole blocks,
    thus the end of a prompt, short questions and decoding; only the rest of a prompt follows the topology. In
    `generate()` they are counted from the prompt's end also where it is prefilled in chunks. With "pattern" every row
    follows the topology, and a SurgeonCache drops what no later row reads: less memory and faster decoding, but heads
    that are not routed forget what lies outside the pattern. The default is "pattern" for a package with routed heads,
    else "dense".

    A package's folder is loaded. Returns the layers that keep their own attention: those of another type, and those
    that the topology does not cover. generate(), caches, chunked prefill and left padding work as before. Each process
    of a tensor-parallel model patches its own part. Everything is checked first: after an error the model is unchanged.
    The model gets a view of its config that names our attention: the config itself is not changed, so another model
    made from it keeps its attention, and whatever is written to either while the model is patched persists after
    `unpatch`.

    Raises:
        PatchError: the package does not fit the model, the model or a part of it is already patched, or the recall is
            unknown.
        PackageError, TargetError: as `load`, if the package is a folder.
    """
    rows_that_ask(DENSE if recall is None else recall, dense_rows)  # refuses wrong ones before a folder is loaded
    package = loaded(package)
    asking = rows_that_ask(recall_of(recall, package.manifest), dense_rows)
    if not isinstance(model, torch.nn.Module):
        raise PatchError("model", "a PreTrainedModel of Transformers", f"a {type(model).__qualname__}", "pass a model")
    for name, module in model.named_modules():
        if hasattr(module, _ATTRIBUTE) or is_bound(module):
            raise PatchError(
                name or type(model).__name__,
                "a model that is not patched",
                "a patched one",
                "call unpatch(model) first",
            )
    left = check_fit(model, package)
    original = model.config
    view = open_view(original, IMPLEMENTATIONS.get(original._attn_implementation, "surgeon"))
    found = [module for _, module in find_attention(model)]
    bound = tuple(module for module in found if layer_type(original, layer_of(module)) == FULL)
    alone = [module for module in found if module not in bound]  # these keep the config, and so their attention
    holders = tuple(
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if value is original and module not in alone
    )
    uncovered = {layer.layer for layer in left}
    part = package.part(local_kv_heads(find_attention(model), package.manifest.model))
    register()
    for module, name in holders:
        setattr(module, name, view)
    for module in bound:
        index = layer_of(module)
        covering = None if index in uncovered else part
        bind(module, Site(covering, index, asking, None if covering is None else covering.kernels.direct(index)))
    if asking:
        note_prompt_ends(model)
    setattr(model, _ATTRIBUTE, _Patch(original, view, holders, bound))
    model._supports_flash_attn = False  # else continuous batching would silently use FlashAttention instead
    for layer in left:
        _LOG.info("layer %d keeps its attention: %s", layer.layer, layer.reason)
    return left


def unpatch(model: torch.nn.Module) -> None:
    """Takes the kernels out again: the model, or the one in this wrapper, gets its config object and attention back.

    Raises:
        PatchError: the model is not patched.
    """
    patched = next((module for module in model.modules() if _ATTRIBUTE in vars(module)), None)
    if patched is None:
        raise PatchError(
            type(model).__name__,
            "a patched model",
            "one that is not",
            "pass the model that patch(model, package) was given",
        )
    record: _Patch = vars(patched)[_ATTRIBUTE]
    for module, name in record.holders:
        setattr(module, name, record.config)
    close_view(record.view)
    forget_prompt_ends(patched)
    for module in record.bound:
        release(module)
    for name in ("_supports_flash_attn", _ATTRIBUTE):
        delattr(patched, name)


def is_patched(model: torch.nn.Module) -> bool:
    """True if `patch` has been called on this model and `unpatch` has not been called since."""
    return hasattr(model, _ATTRIBUTE)
