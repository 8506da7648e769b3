"""Loads verified packages, whose kernels can then be called by layer and dtype."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import NoReturn, cast

import torch

from surgeon.runtime.cache.liveness import Liveness
from surgeon.runtime.errors import PackageError, PatchError, short_repr
from surgeon.runtime.kernels.devices import placed
from surgeon.runtime.kernels.run import LayerKernels
from surgeon.runtime.operands import operands_of
from surgeon.runtime.ops import input_checks  # noqa: F401 - loaded graphs contain its ops
from surgeon.runtime.ops.attention import attention
from surgeon.runtime.ops.registry import register
from surgeon.runtime.ops.transforms import refuse_tangents
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.reader import PackageFiles, read_package


def load(
    folder: str | os.PathLike[str],
    strict: bool = False,
    cpu_variant: str | None = None,
    device: str | torch.device | None = None,
    sha256: str | None = None,
    hub_cache: bool = False,
) -> "Package":
    """Verifies a package and loads its kernels for a device. Nothing is ever compiled.

    With `strict`, a call that would need a fallback is an error: a wider dtype because the package lacks the call's, or
    a copy of tensors whose address or strides a GPU's kernels do not take. `cpu_variant` names one of the CPU library's
    instruction sets; None takes the processor's fastest. `device` None means the CPU if the package has kernels for it,
    else the current GPU; other devices' kernels are loaded on first use or by `Package.prepare`. `sha256` is the
    identity that the package must have: the SHA-256 of its manifest, which `surgeon compile` and `inspect` print.
    `hub_cache` is as in `read_package`: without it, a link is refused wherever it leads.

    Raises:
        PackageError: the package is damaged, untrustworthy, or not the one that `sha256` names; or its parts are not
            from one compile.
        TargetError: the package holds no kernels for this machine or this device.
    """
    package = open_package(folder, strict, cpu_variant, sha256, hub_cache)
    if device is None:
        device = "cuda" if "cpu" not in package.manifest.targets and torch.cuda.is_available() else "cpu"
    package.prepare(device)
    return package


def open_package(
    folder: str | os.PathLike[str],
    strict: bool = False,
    cpu_variant: str | None = None,
    sha256: str | None = None,
    hub_cache: bool = False,
) -> "Package":
    """Verifies a package like `load`, and leaves its kernels to be loaded for each device on first use.

    Raises:
        PackageError: the package is damaged, untrustworthy, or not the one that `sha256` names; or its parts are not
            from one compile.
    """
    files = read_package(folder, hub_cache)
    if sha256 is not None and sha256.lower() != files.id:
        raise PackageError(
            str(files.folder), f"the package {short_repr(sha256, 70)}", files.id, "use the package that was meant"
        )
    _ = files.schedules  # so that another topology's are refused before any kernel is loaded
    return Package(files, LayerKernels(files, strict, cpu_variant))


def loaded(package: object) -> "Package":
    """The package itself, or the one that is loaded from a folder.

    Raises:
        PatchError: it is neither a package nor a folder's name.
        PackageError, TargetError: as `load`.
    """
    if isinstance(package, str | os.PathLike):
        return load(package)
    if not isinstance(package, Package):
        raise PatchError(
            "package",
            "a package or its folder",
            f"a {type(package).__qualname__}",
            'pass surgeon.runtime.load("kernels")',
        )
    return package


class Package:
    """The loaded kernels of one topology, made by `load`; safe to call from several threads."""

    def __init__(self, files: PackageFiles, kernels: LayerKernels) -> None:
        self.manifest: Manifest = files.manifest
        self.kernels = kernels
        self._files = files
        register(kernels)

    @property
    def id(self) -> str:
        """The key by which ops find it: the SHA-256 of the manifest and the options of `load` that affect results."""
        return self.kernels.id

    @property
    def kv_heads(self) -> range:
        """The KV heads that it runs in each layer."""
        return self.kernels.kv_heads

    @property
    def strict(self) -> bool:
        """True if a call that would need a fallback is an error."""
        return self.kernels.strict

    @property
    def cpu_variant(self) -> str:
        """The instruction set that the CPU kernels use."""
        return self.kernels.devices.cpu.variant

    @property
    def cpu_variants(self) -> tuple[str, ...]:
        """The instruction sets of the CPU library that this processor supports."""
        return self.kernels.devices.cpu.variants

    def explain(self, layer: int, length: int) -> str:
        """Says in one line if a CPU prefill of `length` tokens runs on the kernel or as dense attention, and why.

        Raises:
            PatchError: the package does not cover the layer.
        """
        self.kernels.check_layer(layer)
        return self.kernels.devices.cpu.dense_rows.explain(layer, length)

    def prepare(self, device: str | torch.device) -> None:
        """Loads a device's kernels, if they are not loaded yet.

        Otherwise the first call on the device loads them, which must not happen in a captured graph.

        Raises:
            PackageError: the kernels are damaged or of another version.
            TargetError: the package holds none for the device, or the machine has no such device.
        """
        self.kernels.devices.on(placed(device))

    def dtypes_on(self, device: str | torch.device) -> tuple[torch.dtype, ...]:
        """The dtypes of the package's kernels for a device; loads these kernels as `prepare` does.

        Raises:
            PackageError, TargetError: as `prepare`.
        """
        return self.kernels.devices.on(placed(device)).dtypes

    def part(self, kv_heads: range) -> "Package":
        """This package for only some of each layer's KV heads and their query heads: q, k and v then hold no others.

        It shares the loaded kernels; keep it as long as its heads are called. Each process of a tensor-parallel model
        runs its own heads on such a part.

        Raises:
            PatchError: `kv_heads` is empty or is not a range of consecutive heads of the package.
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
        return Package(self._files, self.kernels.part(kv_heads))

    def liveness(self) -> Mapping[int, Liveness]:
        """Every layer's last readers, which tell the blocks of a cache that no later row reads.

        Raises:
            PackageError: the package does not hold them.
        """
        return {
            layer: Liveness(torch.from_numpy(schedule.last_readers).long())
            for layer, schedule in self._files.schedules.items()
        }

    def __repr__(self) -> str:
        """The model, targets, layers, density and identity, on one line."""
        manifest, shape = self.manifest, self.manifest.model
        dtypes: dict[str, list[str]] = {}
        for kernel in manifest.kernels:
            if kernel.dtype not in dtypes.setdefault(kernel.target, []):
                dtypes[kernel.target].append(kernel.dtype)
        targets = ", ".join(f"{target} ({' '.join(dtypes[target])})" for target in manifest.targets)
        tokens = manifest.num_blocks * manifest.block_size
        part = "" if len(self.kv_heads) == shape.num_key_value_heads else f", KV heads {self.kv_heads}"
        return (
            f"<Package for {shape.model_type}: {len(manifest.layers)} of {shape.num_hidden_layers} layers{part}, "
            f"{self._density()} of the blocks at {tokens:,} tokens, {targets}, id {self._files.id[:12]}>"
        )

    def _density(self) -> str:
        blocks = self.manifest.num_blocks
        try:
            heads = Counter(head for schedule in self._files.schedules.values() for head in schedule.heads)
        except PackageError:  # the tables are damaged, which a call will say
            return "an unknown share"
        seen = sum(head.visible_blocks(blocks) * count for head, count in heads.items())
        return f"{seen / (blocks * (blocks + 1) // 2 * heads.total()):.1%}"

    def __deepcopy__(self, memo: dict[int, object]) -> "Package":
        """Returns the package itself: a copy of a patched model runs on the same loaded kernels."""
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses to pickle the package, and thus whatever holds one: a patched model or a SurgeonCache.

        Raises:
            PatchError: always.
        """
        raise PatchError(
            "pickle",
            "objects that hold no loaded kernels",
            "a package, or a patched model or a SurgeonCache, which hold one",
            "pickle the model after unpatch(model); where it is read, load the package and patch it again",
        )

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        position: int | torch.Tensor | None = None,
        cache_leftpad: int | torch.Tensor | None = None,
        *,
        dense_rows: int = 0,
        tokens_ahead: int = 0,
        first_key: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Block-sparse causal attention of one layer: q `[B,Hq,Sq,D]`, k and v `[B,Hkv,Sk,D]` to `[B,Sq,Hq,D]`.

        `scale` defaults to D**-0.5. `position`, an int or int tensor `[B]`, is the index in k of the first query's own
        key (default Sk − Sq); keys after a query's own are never read. `cache_leftpad` is the first valid key of a
        sequence (left padding, default 0); blocks are counted from it, and queries before it give zeros. The result is
        contiguous.

        With `dense_rows` of at least 1, a row of blocks that ends after the last query's own key minus that many tokens
        reads every block: so do the last rows of a prompt, and decoding. `tokens_ahead` are the prompt's tokens that
        later calls bring: the rows are counted from their end.

        Raises:
            PatchError: shapes, dtypes or devices do not fit the package.
            TopologyError: a position is outside k, or beyond what the topology covers.
        """
        leftpad = _leftpad(cache_leftpad, first_key)
        operands = operands_of(q, k, v, scale, position, leftpad, dense_rows, tokens_ahead)
        return attention(self.kernels, layer, operands)

    def attention_with_lse(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        position: int | torch.Tensor | None = None,
        cache_leftpad: int | torch.Tensor | None = None,
        *,
        dense_rows: int = 0,
        tokens_ahead: int = 0,
        first_key: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention as by `attention`, and the log-sum-exp (natural logarithm) of each query, fp32 `[B,Hq,Sq]`."""
        leftpad = _leftpad(cache_leftpad, first_key)
        operands = operands_of(q, k, v, scale, position, leftpad, dense_rows, tokens_ahead)
        refuse_tangents(*operands)
        results = torch.ops.surgeon.attention_with_lse(*operands, self.id, layer)
        return cast(tuple[torch.Tensor, torch.Tensor], results)


def _leftpad(
    cache_leftpad: int | torch.Tensor | None, first_key: int | torch.Tensor | None
) -> int | torch.Tensor | None:
    """The left padding of a call, also by the name that it had before version 0.2."""
    if first_key is None:
        return cache_leftpad
    warnings.warn("first_key is called cache_leftpad since version 0.2", DeprecationWarning, stacklevel=3)
    if cache_leftpad is not None:
        raise PatchError(
            "attention: first_key", "cache_leftpad alone", "both", "leave first_key out: it is the old name"
        )
    return first_key
