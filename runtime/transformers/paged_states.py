"""What a SurgeonCache hands the attention function in place of keys and values."""

from typing import TYPE_CHECKING, Any

import torch

from surgeon.runtime.errors import PatchError

if TYPE_CHECKING:
    from surgeon.runtime.transformers.cache import PagedLayer


class PagedStates(torch.Tensor):
    """New keys and values on their way to `layer.attend`, in the shape that all keys so far would have.

    There is nothing in it: every torch function that is given it raises a PatchError, so that no other attention can
    take it for keys.
    """

    layer: "PagedLayer"
    new_keys: torch.Tensor
    new_values: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, layer: "PagedLayer", keys: torch.Tensor, values: torch.Tensor) -> "PagedStates":
        """Wraps up new keys and values `[batch, KV heads, new tokens, head_dim]` of a layer."""
        batch, kv_heads, new_tokens, head_dim = keys.shape
        shape = (batch, kv_heads, layer.get_seq_length() + new_tokens, head_dim)
        states: PagedStates = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=keys.dtype, device=keys.device)
        states.layer, states.new_keys, states.new_values = layer, keys, values
        return states

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PagedStates(layer {self.layer.layer}, {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: Any) -> Any:
        """Refuses.

        Raises:
            PatchError: always.
        """
        raise PatchError(
            "past_key_values",
            "a SurgeonCache in a model that is patched with its package",
            f"one whose keys and values another attention reads ({function})",
            "call surgeon.runtime.patch(model, package) first, or use a DynamicCache",
        )
