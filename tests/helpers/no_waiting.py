"""A mode in which torch refuses whatever would make the host wait for a GPU; it works without one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostWaits(AssertionError):  # noqa: N818
    """A torch call that needs a tensor's values on the host."""


class NoWaiting(TorchDispatchMode):
    """Refuses calls that depend on a tensor's values, such as item() and nonzero().

    Tensors on the meta device hold no values, and also refuse tolist() and copies to the CPU.
    """

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise HostWaits(str(func))
        return func(*args, **(kwargs or {}))
