"""Tries one candidate on a device: compiled into a package, loaded, checked against the definition, timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.specs.tiles import TargetTiles
from surgeon.compiler.topology.topology import Topology
from surgeon.compiler.tune.exact import sampled_error
from surgeon.runtime.errors import PackageError, TargetError
from surgeon.runtime.kernels.gpu.targets import target_of
from surgeon.runtime.loading import load
from surgeon.runtime.package.target import Target

Clock = Callable[[Callable[[], object], bool], float]
"""Measures a call's milliseconds; the second argument is true if host time must not count."""

DTYPE = "bf16"
_TOLERANCE = 5e-3


def device_here() -> tuple[torch.device, Target]:
    """The current GPU and its target.

    Raises:
        TargetError: there is none.
    """
    if not torch.cuda.is_available():
        raise TargetError("surgeon tune", "a GPU that torch can use", "none", "run it on the machine that will serve")
    device = torch.device("cuda", torch.cuda.current_device())
    return device, target_of(device)


@dataclass(frozen=True)
class Bench:
    """A bench to try candidates on: layer 0 of a topology at its full length, on a device with its target.

    `work` is an empty folder for packages.
    """

    topology: Topology
    target: Target
    device: torch.device
    clock: Clock
    work: Path
    jobs: int | None = None

    def measure(self, tiles: TargetTiles, phase: str) -> float:
        """Measures the milliseconds of a phase; see `search.Measure`.

        Raises:
            BuildError, TargetError: the tiles do not compile, or the device does not hold them.
            PackageError: the kernel's output differs from the definition's.
        """
        own = {tiles.target: tiles}
        folder = compile_package(self.topology, self.work / "kernels", [self.target], [DTYPE], self.jobs, tiles=own)
        package = load(folder, strict=True, device=self.device)
        length = self.topology.num_blocks * self.topology.block_size
        q, k, v = self._inputs(length if phase == "prefill" else 1, length)
        call = partial(package.attention, 0, q, k, v)
        mask = torch.from_numpy(self.topology.block_mask(0, self.topology.num_blocks)).to(self.device)
        error = sampled_error(mask, self.topology.block_size, q, k, v, call())
        if not error < _TOLERANCE:
            raise PackageError(
                f"{phase} on {self.target}",
                f"attention to a relative error of {_TOLERANCE}",
                f"an error of {error:.1e}",
                "do not use these tiles, and report them",
            )
        return self.clock(call, phase == "decode")

    def _inputs(self, q_length: int, k_length: int) -> tuple[torch.Tensor, ...]:
        model = self.topology.model
        options: dict[str, Any] = {
            "device": self.device,
            "dtype": torch.bfloat16,
            "generator": torch.Generator(self.device).manual_seed(0),
        }
        q = torch.randn(1, q_length, model.num_attention_heads, model.head_dim, **options).transpose(1, 2)
        k = torch.randn(1, model.num_key_value_heads, k_length, model.head_dim, **options)
        return q, k, torch.randn(k.shape, **options)
