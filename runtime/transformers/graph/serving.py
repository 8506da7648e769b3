"""A patched model as one exported program for prefill and decoding, with its cache among the inputs."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from surgeon.runtime.errors import PatchError
from surgeon.runtime.ops.input_checks import cache_slots
from surgeon.runtime.transformers.attention import runs_kernel
from surgeon.runtime.transformers.cache import CACHE_NAME
from surgeon.runtime.transformers.graph.export import exported
from surgeon.runtime.transformers.layers import computed_dtypes, find_attention


class ServingStep(torch.nn.Module):
    """One step of a patched model over plain tensors: a whole prompt, a part of one, or one token per sequence.

    Raises:
        PatchError: the model is not patched in every layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        found = find_attention(model)
        free = [name for name, module in found if not runs_kernel(module)]
        if free or not found:
            raise PatchError(
                type(model).__name__,
                "a model that is patched in every layer",
                f"{free[0]} without a kernel" if free else "one without attention",
                "call patch(model, package) first, with a package that covers all layers",
            )
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        kept: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Returns the logits `[batch, kept, vocabulary]` after the new tokens `kept`, and writes all keys and values.

        `input_ids` is int64 `[batch, new]`, `position`, int64 `[batch]`, is the number of tokens of each sequence in
        the cache, and `kept`, int64, are indices along the new tokens. `keys` and `values` hold one tensor
        `[batch, KV heads, capacity, head_dim]` per layer, of which `[:, :, position : position + new]` is written. All
        are contiguous. Sequences need not be equally long: padding to the right of the shorter ones is never read, and
        is overwritten by their next tokens, which come at their own position.

        Raises:
            PatchError: tensors have other shapes or layouts, or the cache has no room for the tokens.
        """
        slots = cache_slots(input_ids, position, kept, [*keys, *values])
        layers: list[Any] = [_GivenLayer(position, slots, *pair) for pair in zip(keys, values, strict=True)]
        cache = {CACHE_NAME: Cache(layers=layers)}
        output = self.model(input_ids=input_ids, position_ids=slots, **cache, logits_to_keep=kept)
        return cast(torch.Tensor, output.logits)


class _GivenLayer(CacheLayerMixin):
    """A layer's cache in given tensors, where each sequence's new tokens go to slots of its own."""

    def __init__(self, position: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = self._keys, self._values = keys, values
        self.is_initialized = True
        self._position = position
        self._slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads = (torch.arange(size, device=key_states.device) for size in key_states.shape[:2])
        place = (batch[:, None, None], heads[:, None], self._slots[:, None])
        return self._keys.index_put_(place, key_states), self._values.index_put_(place, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - Transformers' name
        return self._keys.shape[2], 0

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]  # like a static cache, which counts in a tensor
        return self._position

    def get_max_length(self) -> int:
        return self._keys.shape[2]


def serving_program(model: PreTrainedModel) -> torch.export.ExportedProgram:
    """Exports `ServingStep` of a patched model, with any batch, number of new tokens and capacity of the cache.

    It recalls as the model was patched to; rows that ask are counted back from the end of a call's new tokens, padding
    included. The program contains the model's weights but not the package: where it runs, `load` the package first,
    with the same options, and keep a reference to it.

    Raises:
        PatchError: the model is not patched in every layer, or torch.export cannot trace it.
    """
    step = ServingStep(model)
    config = model.config.get_text_config()
    any_size = torch.export.Dim.DYNAMIC
    # Example sizes, such that no two inputs agree by chance.
    batch, new, kept, capacity = 2, 3, 4, 7
    first, attention = find_attention(model)[0]
    head_dim = cast(int, attention.head_dim)
    *_, (_, dtype) = computed_dtypes(model, first)
    shape = (batch, config.num_key_value_heads, capacity, head_dim)
    keys, values = (
        [torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(config.num_hidden_layers)]
        for _ in range(2)
    )
    integers = (torch.zeros(size, dtype=torch.int64, device=model.device) for size in ((batch, new), (batch,), (kept,)))
    dynamic = [{0: any_size, 2: any_size}] * config.num_hidden_layers
    training = model.training
    model.eval()
    try:
        return exported(
            step,
            (*integers, keys, values),
            ({0: any_size, 1: any_size}, {0: any_size}, {0: any_size}, dynamic, dynamic),
            "a model that can be traced with any batch, length and cache",
            "use the patched model itself",
        )
    finally:
        model.train(training)
