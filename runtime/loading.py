"""Loads a verified package: kernels ready to be called, found by layer and dtype."""

import copy
import logging
import os
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import cast

import torch

from surgeon.runtime import backward, inputs, ops  # noqa: F401 - graphs that are loaded hold the ops of inputs
from surgeon.runtime.cpu_kernels import CpuKernels
from surgeon.runtime.errors import PatchError, SurgeonError, TargetError, shown
from surgeon.runtime.gpu import GpuKernels, open_gpu
from surgeon.runtime.liveness import Liveness, read_liveness
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.package import PackageFiles, read_package
from surgeon.runtime.schedules import HeadSchedule, read_schedules

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
        self._num_heads = files.manifest.model.num_attention_heads
        self.strict = strict
        self._files = files
        self._cpu_variant = cpu_variant
        self._loaded: dict[torch.device, CpuKernels | GpuKernels] = {}
        self._loading = threading.Lock()
        self._warned: set[torch.dtype] = set()
        ops.register(self)

    @property
    def cpu_variant(self) -> str:
        """The instruction set that the CPU's kernels run on."""
        return self._cpu.variant

    @property
    def cpu_variants(self) -> tuple[str, ...]:
        """Those that this processor could run."""
        return self._cpu.variants

    def explain(self, layer: int, length: int) -> str:
        """Whether a CPU prefill of `length` tokens runs on the kernel or as dense attention, and why, in one line.

        Raises:
            PatchError: there is no such layer.
        """
        self._check_layer(layer)
        return self._cpu.dense_rows.explain(layer, length)

    def prepare(self, device: str | torch.device) -> None:
        """Loads a device's kernels, if they are not; else its first call does, which must not be in a captured graph.

        Raises:
            PackageError: the kernels are damaged or of another version.
            TargetError: the package holds none for the device, or the machine has no such device.
        """
        self._on(self._place(device))

    def dtypes_on(self, device: str | torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes that the package has kernels in for a device, which is prepared.

        Raises:
            PackageError, TargetError: as `prepare`.
        """
        return self._on(self._place(device)).dtypes

    @property
    def _cpu(self) -> CpuKernels:
        kernels = self._on(torch.device("cpu"))
        assert isinstance(kernels, CpuKernels)
        return kernels

    def _place(self, device: str | torch.device) -> torch.device:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            if not torch.cuda.is_available():
                raise TargetError(str(device), "a GPU that torch can use", "none", "load the package for the CPU")
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu") if device.type == "cpu" else device

    def _on(self, device: torch.device) -> CpuKernels | GpuKernels:
        kernels = self._loaded.get(device)
        if kernels is not None:
            return kernels
        with self._loading:
            if device not in self._loaded:
                if device.type == "cpu":
                    self._loaded[device] = CpuKernels(self._files, self._cpu_variant)
                elif device.type == "cuda":
                    self._loaded[device] = open_gpu(self._files, device, self.strict)
                else:
                    raise TargetError(
                        str(self._files.folder), "tensors on the CPU or a GPU", str(device), "move them to one of these"
                    )
            return self._loaded[device]

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
        part._num_heads = shape.num_attention_heads // shape.num_key_value_heads * len(kv_heads)
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
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.attention(self, layer, q, k, v, _per_sequence(position, q), _per_sequence(first_key, q), scale)

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
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        arguments = (q, k, v, _per_sequence(position, q), _per_sequence(first_key, q), scale, self.id, layer)
        return cast(tuple[torch.Tensor, torch.Tensor], torch.ops.surgeon.attention_with_lse(*arguments))

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: torch.Tensor | None,
        first_key: torch.Tensor | None,
        scale: float,
        log_sum_exp: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the torch ops call: checks the tensors against the package and runs the kernel.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit the package.
            PackageError, TargetError: as `prepare`, when it is the first call on the device.
        """
        self._check(q, k, v, position, first_key)
        self._check_layer(layer)
        kernels = self._on(q.device)
        if q.dtype not in kernels.dtypes:
            dtype = self._wider(kernels.dtypes, q.dtype)
            q_, k_, v_ = (tensor.to(dtype) for tensor in (q, k, v))
            out = kernels.attend(layer, q_, k_, v_, position, first_key, scale, log_sum_exp, self.kv_heads.start)
            return out.to(q.dtype)
        return kernels.attend(layer, q, k, v, position, first_key, scale, log_sum_exp, self.kv_heads.start)

    def run_paged(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: torch.Tensor,
        position: torch.Tensor,
        first_key: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """As `run` on the CPU, on a cache that holds a part of the blocks, each in a slot somewhere.

        k and v are `[slots, block_size, D]`; `pages`, int32 `[B, Hkv, blocks]`, is the slot of each block of each KV
        head, counted from the first valid key, and -1 for a block that is not held, which no query may read.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit, or a query reads a block that is not held.
        """
        self._check_layer(layer)
        self._check_queries(q, position, first_key)
        model, block_size = self.manifest.model, self.manifest.block_size
        for name, slots in (("k", k), ("v", v)):
            if slots.dim() != 3 or slots.shape != k.shape or slots.shape[1:] != (block_size, model.head_dim):
                raise _misfit(name, f"[slots, {block_size}, {model.head_dim}], k and v alike", slots)
            if slots.dtype != q.dtype or slots.device.type != "cpu":
                raise PatchError(
                    f"attention: {name}", f"{q.dtype} on cpu, as q", f"{slots.dtype} on {slots.device}", "convert it"
                )
        if pages.dim() != 3 or pages.shape[:2] != (q.shape[0], len(self.kv_heads)):
            raise _misfit("pages", f"[{q.shape[0]}, {len(self.kv_heads)}, blocks]", pages)
        if pages.dtype != torch.int32 or pages.device.type != "cpu":
            raise PatchError(
                "attention: pages", "torch.int32 on cpu", f"{pages.dtype} on {pages.device}", "convert them"
            )
        kernels = self._cpu
        dtype = q.dtype if q.dtype in kernels.dtypes else self._wider(kernels.dtypes, q.dtype)
        q_, k_, v_ = (tensor.to(dtype) for tensor in (q, k, v))
        out = kernels.attend_paged(layer, q_, k_, v_, pages, position, first_key, scale, self.kv_heads.start)
        return out.to(q.dtype)

    def run_rotary(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        first_key: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """As `run` on the CPU, on queries and keys of whole sequences that the kernel rotates itself.

        cos and sin are `[B or 1, length, D]`; rotated is x * cos + rotate_half(x) * sin, as in Llama.

        Raises:
            PatchError: shapes, dtypes or devices that do not fit the package or each other.
        """
        self._check(q, k, v, None, first_key)
        self._check_layer(layer)
        batch, _, length, head_dim = q.shape
        if k.shape[2] != length:
            raise _misfit("k", f"[{batch}, {k.shape[1]}, {length}, {head_dim}], a key for each query", k)
        for name, table in (("cos", cos), ("sin", sin)):
            if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (length, head_dim):
                raise _misfit(name, f"[{batch}, {length}, {head_dim}]", table)
            if table.dtype != q.dtype or table.device.type != "cpu":
                raise PatchError(
                    f"attention: {name}", f"{q.dtype} on cpu, as q", f"{table.dtype} on {table.device}", "convert it"
                )
        kernels = self._cpu
        dtype = q.dtype if q.dtype in kernels.dtypes else self._wider(kernels.dtypes, q.dtype)
        q_, k_, v_, cos_, sin_ = (tensor.to(dtype) for tensor in (q, k, v, cos, sin))
        # One layout for both: the kernel takes one pair of strides.
        rotary = (cos_.contiguous().expand(batch, -1, -1), sin_.contiguous().expand(batch, -1, -1))
        out = kernels.attend(layer, q_, k_, v_, None, first_key, scale, None, self.kv_heads.start, rotary)
        return out.to(q.dtype)

    def run_backward(
        self,
        layer: int,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: torch.Tensor | None,
        first_key: torch.Tensor | None,
        scale: float,
    ) -> backward.Gradients:
        """The gradients of q, k and v of a call of `run` on the CPU, from those of its results.

        Raises:
            PatchError: shapes or dtypes that do not fit the package, or tensors that are not on the CPU.
        """
        self._check(q, k, v, position, first_key)
        self._check_layer(layer)
        if q.device.type != "cpu":
            raise PatchError(
                "surgeon.attention", "tensors on the CPU in a backward pass", str(q.device), ops.WITHOUT_GRADIENTS
            )
        batch, length = q.shape[0], q.shape[2]
        positions = [k.shape[2] - length] * batch if position is None else position.tolist()
        first_keys = [0] * batch if first_key is None else first_key.tolist()
        first = self.kv_heads.start * self._num_heads // len(self.kv_heads)
        heads = self._schedules[layer][first : first + self._num_heads]
        block_size = self.manifest.block_size
        return backward.gradients(heads, block_size, grad_out, grad_lse, q, k, v, positions, first_keys, scale)

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

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: torch.Tensor | None,
        first_key: torch.Tensor | None,
    ) -> None:
        self._check_queries(q, position, first_key)
        kv_heads, head_dim = len(self.kv_heads), self.manifest.model.head_dim
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dim() != 4 or tensor.shape[:2] != (q.shape[0], kv_heads) or tensor.shape[3] != head_dim:
                raise _misfit(name, f"[{q.shape[0]}, {kv_heads}, length, {head_dim}]", tensor)
            if tensor.dtype != q.dtype or tensor.device != q.device:
                raise PatchError(
                    f"attention: {name}",
                    f"{q.dtype} on {q.device}, as q",
                    f"{tensor.dtype} on {tensor.device}",
                    "convert it",
                )
        if k.shape != v.shape:
            raise _misfit("v", f"{list(k.shape)}, as k", v)

    def _check_queries(self, q: torch.Tensor, position: torch.Tensor | None, first_key: torch.Tensor | None) -> None:
        heads, head_dim = self._num_heads, self.manifest.model.head_dim
        if q.dim() != 4 or q.shape[1] != heads or q.shape[3] != head_dim:
            raise _misfit("q", f"[batch, {heads}, length, {head_dim}]", q)
        for name, place in (("position", position), ("first_key", first_key)):
            if place is not None and (place.shape != q.shape[:1] or place.dtype not in (torch.int64, torch.int32)):
                raise PatchError(
                    f"attention: {name}",
                    f"an int or an integer tensor [{q.shape[0]}]",
                    f"{place.dtype} {list(place.shape)}",
                    "give one number a sequence",
                )

    def _wider(self, known: tuple[torch.dtype, ...], dtype: torch.dtype) -> torch.dtype:
        """The packaged dtype that loses nothing of `dtype`, for a call that the package has no kernel for."""
        error = PatchError(
            "attention: q",
            "one of " + ", ".join(map(str, known)),
            str(dtype),
            "convert the tensors, or compile the package with that --dtype",
        )
        if self.strict or dtype not in (torch.bfloat16, torch.float16) or torch.float32 not in known:
            raise error
        if dtype not in self._warned:
            self._warned.add(dtype)
            _LOG.warning("package %s has no %s kernels: calls run in float32", self.id[:12], dtype)
        return torch.float32


def _per_sequence(value: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    return torch.full(q.shape[:1], value, dtype=torch.int64, device=q.device) if isinstance(value, int) else value


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> SurgeonError:
    return PatchError(f"attention: {name}", expected, str(list(tensor.shape)), "pass the package's own model's tensors")
