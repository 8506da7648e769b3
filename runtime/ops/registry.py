"""The registry where torch ops find loaded packages by id, since their arguments are only tensors and plain values."""

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.operands import Gradients, Nodes, Operands


class Runner(Protocol):
    """The interface that ops call; see `surgeon.runtime.kernels.run.LayerKernels`."""

    id: str

    def direct(self, layer: int) -> Callable[..., torch.Tensor | None] | None:
        """A layer's call without Python, if there is one."""

    def run(self, layer: int, operands: Operands, lse: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of one layer."""

    def run_paged(
        self,
        layer: int,
        operands: Operands,
        block_table: torch.Tensor,
        *,
        nodes: Nodes | None = None,
    ) -> torch.Tensor:
        """Attention of one layer over a cache that holds only some of the blocks."""

    def run_rotary(self, layer: int, operands: Operands, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attention of one layer over queries and keys that are rotated first."""

    def run_backward(
        self, layer: int, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, operands: Operands
    ) -> Gradients:
        """The gradients of a call of `run`."""


# A package may be loaded more than once; its id is known as long as one of the loads is referenced. Both levels are
# replaced and never changed, so that calls look up without a lock while other threads load.
_runners: dict[str, tuple[weakref.ref[Runner], ...]] = {}
_registering = threading.Lock()


def register(runner: Runner) -> None:
    """Makes a loaded package known to the ops by its id, for as long as it is referenced somewhere."""
    global _runners
    with _registering:
        loads = {key: tuple(load for load in loads if load() is not None) for key, loads in _runners.items()}
        loads[runner.id] = (*loads.get(runner.id, ()), weakref.ref(runner))
        _runners = {key: alive for key, alive in loads.items() if alive}


def find(package: str) -> Runner:
    """Finds the loaded package with this id.

    Raises:
        PackageError: no package with this id is loaded in this process.
    """
    loaded = (load() for load in _runners.get(package, ()))
    found = next((runner for runner in loaded if runner is not None), None)
    if found is None:
        manifest, *options = package.split(":")
        raise PackageError(
            "surgeon.attention",
            f"package {manifest[:12]} loaded" + (f" with {', '.join(options)}" if options else " in this process"),
            "none with this id",
            "call surgeon.runtime.load on its folder first, with the same options, and keep the result",
        )
    return found
