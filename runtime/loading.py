"""Loads a verified package: kernels ready to be called, found by layer and dtype."""

import logging
import os

import torch

from surgeon.runtime import ops
from surgeon.runtime.cpu import CpuLibrary
from surgeon.runtime.errors import PackageError, PatchError, SurgeonError, TargetError, shown
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.package import PackageFiles, read_package

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOG = logging.getLogger("surgeon")


def load(folder: str | os.PathLike[str], strict: bool = False, cpu_variant: str | None = None) -> "Package":
    """Verifies a package and loads its kernels for this machine's processor. Nothing is ever compiled.

    With `strict`, a dtype that the package lacks is an error; otherwise such a call runs in a wider one and warns.
    `cpu_variant` asks for one of the library's instruction sets by name; None takes the processor's fastest.

    Raises:
        PackageError: the package is damaged or not to be trusted.
        TargetError: it holds no kernels for this machine.
    """
    return Package(read_package(folder), strict, cpu_variant)


class Package:
    """The loaded kernels of one topology. Made by `load`; safe to call from several threads."""

    def __init__(self, files: PackageFiles, strict: bool, cpu_variant: str | None) -> None:
        manifest = files.manifest
        if "cpu" not in manifest.targets:
            raise TargetError(
                str(files.folder),
                "kernels for cpu",
                "only " + ", ".join(manifest.targets) if manifest.targets else "none",
                "compile the package again with --target cpu",
            )
        self.id: str = files.id
        self.manifest: Manifest = manifest
        self.strict = strict
        kernels = [kernel for kernel in manifest.kernels if kernel.target == "cpu"]
        libraries = {
            path: CpuLibrary(files.files[path], f"{files.folder}/{path}", cpu_variant)
            for path in {kernel.file for kernel in kernels}
        }
        self._kernels = {}
        for kernel in kernels:
            if kernel.dtype not in _DTYPES:
                raise PackageError(
                    f"{files.folder}: kernels", "a known dtype", shown(kernel.dtype), "compile the package again"
                )
            library = libraries[kernel.file]
            for layer in kernel.layers:
                self._kernels[layer, _DTYPES[kernel.dtype]] = library, library.kernel(kernel.symbol)
        self.cpu_variant: str = next(iter(libraries.values())).variant
        self.cpu_variants: tuple[str, ...] = next(iter(libraries.values())).variants
        self.dtypes: tuple[torch.dtype, ...] = tuple(dtype for dtype in _DTYPES.values() if (0, dtype) in self._kernels)
        self._warned: set[torch.dtype] = set()
        ops.register(self)

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
        return torch.ops.surgeon.attention(  # type: ignore[no-any-return]
            q,
            k,
            v,
            _per_sequence(position, q.shape[0]),
            _per_sequence(first_key, q.shape[0]),
            q.shape[-1] ** -0.5 if scale is None else scale,
            self.id,
            layer,
        )

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
        return torch.ops.surgeon.attention_with_lse(  # type: ignore[no-any-return]
            q,
            k,
            v,
            _per_sequence(position, q.shape[0]),
            _per_sequence(first_key, q.shape[0]),
            q.shape[-1] ** -0.5 if scale is None else scale,
            self.id,
            layer,
        )

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
        """
        self._check(q, k, v, position, first_key)
        found = self._kernels.get((layer, q.dtype))
        if found is None:
            dtype = self._wider(layer, q.dtype)
            q_, k_, v_ = (tensor.to(dtype) for tensor in (q, k, v))
            return self.run(layer, q_, k_, v_, position, first_key, scale, log_sum_exp).to(q.dtype)
        library, kernel = found
        return library.attend(kernel, q, k, v, position, first_key, scale, log_sum_exp)

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position: torch.Tensor | None,
        first_key: torch.Tensor | None,
    ) -> None:
        model = self.manifest.model
        heads, kv_heads, head_dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        if q.dim() != 4 or q.shape[1] != heads or q.shape[3] != head_dim:
            raise _misfit("q", f"[batch, {heads}, length, {head_dim}]", q)
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
        for name, place in (("position", position), ("first_key", first_key)):
            if place is not None and (place.shape != q.shape[:1] or place.dtype not in (torch.int64, torch.int32)):
                raise PatchError(
                    f"attention: {name}",
                    f"an int or an integer tensor [{q.shape[0]}]",
                    f"{place.dtype} {list(place.shape)}",
                    "give one number a sequence",
                )

    def _wider(self, layer: int, dtype: torch.dtype) -> torch.dtype:
        """The packaged dtype that loses nothing of `dtype`, for a call that the package has no kernel for."""
        if not 0 <= layer < self.manifest.model.num_hidden_layers:
            raise _no_layer(layer, self.manifest.model.num_hidden_layers)
        error = PatchError(
            "attention: q",
            "one of " + ", ".join(str(known) for known in self.dtypes),
            str(dtype),
            "convert the tensors, or compile the package with that --dtype",
        )
        if self.strict or dtype not in (torch.bfloat16, torch.float16) or torch.float32 not in self.dtypes:
            raise error
        if dtype not in self._warned:
            self._warned.add(dtype)
            _LOG.warning("package %s has no %s kernels: calls run in float32", self.id[:12], dtype)
        return torch.float32


def _per_sequence(value: int | torch.Tensor | None, batch: int) -> torch.Tensor | None:
    return torch.full((batch,), value, dtype=torch.int64) if isinstance(value, int) else value


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> SurgeonError:
    return PatchError(f"attention: {name}", expected, str(list(tensor.shape)), "pass the package's own model's tensors")


def _no_layer(layer: int, num_layers: int) -> SurgeonError:
    return PatchError("attention: layer", f"a layer in 0..{num_layers - 1}", str(layer), "correct the index")
