"""Loads a verified package: kernels ready to be called, found by layer and dtype."""

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch

from surgeon.runtime.cache.liveness import Liveness, read_liveness
from surgeon.runtime.errors import PatchError, shown
from surgeon.runtime.kernels import backward
from surgeon.runtime.kernels.devices import DeviceKernels, placed
from surgeon.runtime.operands import Operands, check, check_paged, check_rotary
from surgeon.runtime.ops import attention as ops
from surgeon.runtime.ops import input_checks as inputs  # noqa: F401 - graphs that are loaded hold the ops of inputs
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.schedule import HeadSchedule, read_schedules

_LOG = logging.getLogger("surgeon")
_PART = ":kv_heads="


def load(
    folder: str | os.PathLike[str],
    strict: bool = False,
    cpu_variant: str | None = None,
    device: str | torch.device | None = None,
) -> "Package":
    """Verifies a package and loads its kernels for a device. Nothing is ever compiled.

    With `strict`, what a call would fall back on is an error: a wider dtype where the package lacks the call's, or a
    copy of tensors whose address or strides a GPU's kernels do not take. `cpu_variant` asks for one of the CPU
    library's instruction sets by name; None takes the processor's fastest. `device` None means the CPU where the
    package has kernels for it, else the current GPU; other devices' kernels are loaded when they are first needed, or
    by `Package.prepare`.

    Raises:
        PackageError: the package is damaged or not to be trusted.
        TargetError: it holds no kernels for this machine or this device.
    """
    files = read_package(folder)
    if device is None:
        device = "cuda" if "cpu" not in files.manifest.targets and torch.cuda.is_available() else "cpu"
    package = Package(files, strict, cpu_variant)
    package.prepare(device)
    return package


class Package:
    """The loaded kernels of one topology. Made by `load`; safe to call from several threads."""

    def __init__(self, files: PackageFiles, strict: bool, cpu_variant: str | None) -> None:
        # What the ops find it by: two loads of one package that would answer a call differently have different ids.
        options = (*(("strict",) if strict else ()), *((cpu_variant,) if cpu_variant else ()))
        self.id: str = ":".join((files.id, *options))
        self.manifest: Manifest = files.manifest
        self.kv_heads = range(files.manifest.model.num_key_value_heads)
        self.strict = strict
        self._shape = files.manifest.model
        self._files = files
        self._devices = DeviceKernels(files, strict, cpu_variant)
        self._warned: set[torch.dtype] = set()
        ops.register(self)

    @property
    def cpu_variant(self) -> str:
        """The instruction set that the CPU's kernels run on."""
        return self._devices.cpu.variant

    @property
    def cpu_variants(self) -> tuple[str, ...]:
        """Those that this processor could run."""
        return self._devices.cpu.variants

    def explain(self, layer: int, length: int) -> str:
        """Whether a CPU prefill of `length` tokens runs on the kernel or as dense attention, and why, in one line.

        Raises:
            PatchError: there is no such layer.
        """
        self._check_layer(layer)
        return self._devices.cpu.dense_rows.explain(layer, length)

    def prepare(self, device: str | torch.device) -> None:
        """Loads a device's kernels, if they are not; else its first call does, which must not be in a captured graph.

        Raises:
            PackageError: the kernels are damaged or of another version.
            TargetError: the package holds none for the device, or the machine has no such device.
        """
        self._devices.on(placed(device))

    def dtypes_on(self, device: str | torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes that the package has kernels in for a device, which is prepared.

        Raises:
            PackageError, TargetError: as `prepare`.
        """
        return self._devices.on(placed(device)).dtypes

    def part(self, kv_heads: range) -> "Package":
        """This package for some of each layer's KV heads and their query heads alone: q, k and v then hold no others.

        It shares the loaded kernels; keep it as long as its heads are called. The process of a tensor-parallel model
        runs its own heads on such a part.

        Raises:
            PatchError: not consecutive heads of the package, or none.
        """
        shape = self.manifest.model
        if kv_heads.step != 1 or not 0 <= kv_heads.start < kv_heads.stop <= shape.num_key_value_heads:
            raise PatchError(
                "Package.part",
                f"consecutive KV heads out of 0..{shape.num_key_value_heads - 1}",
                str(kv_heads),
                "correct the range",
            )
        if kv_heads == self.kv_heads:
            return self
        part = copy.copy(self)
        part.kv_heads = kv_heads
        heads = shape.num_attention_heads // shape.num_key_value_heads * len(kv_heads)
        part._shape = replace(shape, num_attention_heads=heads, num_key_value_heads=len(kv_heads))
        part.id = f"{self.id.partition(_PART)[0]}{_PART}{kv_heads.start}-{kv_heads.stop}"
        ops.register(part)
        return part

    def liveness(self) -> Mapping[int, Liveness]:
        """Every layer's last readers: which blocks of a cache no later row reads.

        Raises:
            PackageError: the package does not say.
        """
        return read_liveness(self._files)

    def __deepcopy__(self, memo: dict[int, object]) -> "Package":
        """The package itself: a copy of a patched model runs on the same loaded kernels."""
        return self

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        position: int | torch.Tensor | None = None,
        first_key: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Block-sparse causal attention of one layer: q `[B,Hq,Sq,D]`, k and v `[B,Hkv,Sk,D]` to `[B,Sq,Hq,D]`.

        `scale` defaults to D**-0.5. `position`, an int or int tensor `[B]`, is the index in k of the first query's own
        key (default Sk − Sq); keys after a query's own are never read. `first_key` is the first valid key (left
        padding, default 0); blocks are counted from it, and queries before it give zeros. The result is contiguous.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit the package.
            TopologyError: a position outside k, or beyond what the topology covers.
        """
        return ops.attention(self, layer, _operands(q, k, v, scale, position, first_key))

    def attention_with_lse(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        position: int | torch.Tensor | None = None,
        first_key: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attention`, with the natural logarithm of each query's sum of exponentials, fp32 `[B,Hq,Sq]`."""
        arguments = (*_operands(q, k, v, scale, position, first_key), self.id, layer)
        return cast(tuple[torch.Tensor, torch.Tensor], torch.ops.surgeon.attention_with_lse(*arguments))

    def run(self, layer: int, operands: Operands, log_sum_exp: torch.Tensor | None = None) -> torch.Tensor:
        """What the torch ops call: checks the operands against the package and runs the kernel.

        `log_sum_exp`, fp32 `[B,Hq,Sq]`, is filled where it is given.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit the package.
            PackageError, TargetError: as `prepare`, when it is the first call on the device.
        """
        check(operands, self._shape)
        self._check_layer(layer)
        kernels = self._devices.on(operands.q.device)
        taken = self._in_one_of(kernels.dtypes, operands)
        out = kernels.attend(layer, taken, log_sum_exp, self.kv_heads.start)
        return out if taken is operands else out.to(operands.q.dtype)

    def run_paged(self, layer: int, operands: Operands, pages: torch.Tensor) -> torch.Tensor:
        """As `run` on the CPU, on a cache that holds a part of the blocks, each in a slot somewhere.

        k and v are `[slots, block_size, D]`; `pages`, int32 `[B, Hkv, blocks]`, is the slot of each block of each KV
        head, counted from the first valid key, and -1 for a block that is not held, which no query may read.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit, or a query reads a block that is not held.
        """
        self._check_layer(layer)
        check_paged(operands, pages, self._shape, self.manifest.block_size)
        kernels = self._devices.cpu
        taken = self._in_one_of(kernels.dtypes, operands)
        return kernels.attend_paged(layer, taken, pages, self.kv_heads.start).to(operands.q.dtype)

    def run_rotary(self, layer: int, operands: Operands, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As `run` on the CPU, on queries and keys of whole sequences that the kernel rotates itself.

        cos and sin are `[B or 1, length, D]`; rotated is x * cos + rotate_half(x) * sin, as in Llama.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit the package or each other.
        """
        check_rotary(operands, cos, sin, self._shape)
        self._check_layer(layer)
        kernels = self._devices.cpu
        taken = self._in_one_of(kernels.dtypes, operands)
        # One layout for both: the kernel takes one pair of strides.
        cos, sin = (table.to(taken.q.dtype).contiguous().expand(taken.q.shape[0], -1, -1) for table in (cos, sin))
        return kernels.attend(layer, taken, None, self.kv_heads.start, (cos, sin)).to(operands.q.dtype)

    def run_backward(
        self, layer: int, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, operands: Operands
    ) -> backward.Gradients:
        """The gradients of q, k and v of a call of `run` on the CPU, from those of its results.

        Raises:
            PatchError: shapes or dtypes that do not fit the package, or tensors that are not on the CPU.
        """
        check(operands, self._shape)
        self._check_layer(layer)
        if operands.q.device.type != "cpu":
            raise PatchError(
                "surgeon.attention",
                "tensors on the CPU in a backward pass",
                str(operands.q.device),
                ops.WITHOUT_GRADIENTS,
            )
        heads = self._shape.num_attention_heads
        first = self.kv_heads.start * heads // len(self.kv_heads)
        schedules = self._schedules[layer][first : first + heads]
        return backward.gradients(schedules, self.manifest.block_size, grad_out, grad_lse, operands)

    @cached_property
    def _schedules(self) -> dict[int, tuple[HeadSchedule, ...]]:
        return read_schedules(self._files)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.manifest.layers:
            raise PatchError(
                "attention: layer",
                f"one of the layers {shown(self.manifest.layers)} that the package covers",
                str(layer),
                "correct the index",
            )

    def _in_one_of(self, dtypes: tuple[torch.dtype, ...], operands: Operands) -> Operands:
        """The operands, in a wider dtype where there is no kernel for theirs, which loses nothing of them."""
        dtype = operands.q.dtype
        if dtype in dtypes:
            return operands
        if self.strict or dtype not in (torch.bfloat16, torch.float16) or torch.float32 not in dtypes:
            raise PatchError(
                "attention: q",
                "one of " + ", ".join(map(str, dtypes)),
                str(dtype),
                "convert the tensors, or compile the package with that --dtype",
            )
        if dtype not in self._warned:
            self._warned.add(dtype)
            _LOG.warning("package %s has no %s kernels: calls run in float32", self.id[:12], dtype)
        return operands.to(torch.float32)


def _operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    position: int | torch.Tensor | None,
    first_key: int | torch.Tensor | None,
) -> Operands:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Operands(q, k, v, _per_sequence(position, q), _per_sequence(first_key, q), scale)


def _per_sequence(value: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    return torch.full(q.shape[:1], value, dtype=torch.int64, device=q.device) if isinstance(value, int) else value
