"""A mode in which torch refuses whatever would make the host wait for a GPU; it needs none."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostWaits(AssertionError):  # noqa: N818
    """A call of torch that has to know what a tensor holds."""


class NoWaiting(TorchDispatchMode):
    """Refuses what depends on the values of a tensor, as item() and nonzero() do.

    Tensors of the meta device hold no values, and refuse tolist() and copies to the CPU besides.
    """

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise HostWaits(str(func))
        return func(*args, **(kwargs or {}))
