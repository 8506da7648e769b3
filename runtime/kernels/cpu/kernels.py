"""A package's kernels on the CPU, by layer and dtype."""

import torch

from surgeon.runtime.errors import PackageError, TargetError, short_repr
from surgeon.runtime.kernels.cpu import sdpa
from surgeon.runtime.kernels.cpu.dense_rows import DenseRows, dense_tokens
from surgeon.runtime.kernels.cpu.library import CpuLibrary
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.reader import PackageFiles

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CpuKernels:
    """A package's kernels in this process, for one of its library's instruction sets; see `CpuLibrary` for `variant`.

    Raises:
        TargetError: the package has no kernels for the CPU, or none for this processor.
        PackageError: the library is damaged or of another version.
    """

    def __init__(self, files: PackageFiles, variant: str | None) -> None:
        manifest = files.manifest
        if "cpu" not in manifest.targets:
            raise TargetError(
                str(files.folder),
                "kernels for cpu",
                "only " + ", ".join(manifest.targets) if manifest.targets else "none",
                "compile the package again with --target cpu",
            )
        kernels = [kernel for kernel in manifest.kernels if kernel.target == "cpu"]
        libraries = {
            path: CpuLibrary(files.files[path], f"{files.folder}/{path}", variant)
            for path in {kernel.file for kernel in kernels}
        }
        self._kernels = {}
        for kernel in kernels:
            if kernel.dtype not in _DTYPES:
                raise PackageError(
                    f"{files.folder}: kernels", "a known dtype", short_repr(kernel.dtype), "compile the package again"
                )
            library = libraries[kernel.file]
            for layer in kernel.layers:
                self._kernels[layer, _DTYPES[kernel.dtype]] = library, library.kernel(kernel.symbol)
        first = next(iter(libraries.values()))
        self.variant: str = first.variant
        self.dense_rows = DenseRows(dense_tokens(manifest, files.schedules), first.variant)
        self.variants: tuple[str, ...] = first.variants
        self.dtypes: tuple[torch.dtype, ...] = tuple(
            dtype for dtype in _DTYPES.values() if (manifest.layers[0], dtype) in self._kernels
        )

    def attend(
        self,
        layer: int,
        operands: Operands,
        lse: torch.Tensor | None = None,
        first_kv_head: int = 0,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs a layer's kernel, or dense attention where it is equivalent and faster; see `CpuLibrary.attend`."""
        if self.dense_rows.torch_is_faster and lse is None and rotary is None:
            end = sdpa.visible_end(operands)
            most = min(self.dense_rows.tokens[layer], operands.k.shape[2])
            if end is not None and operands.q.shape[2] <= end <= most:
                return sdpa.attend(operands, end)
        library, kernel = self._kernels[layer, operands.q.dtype]
        return library.attend(kernel, operands, lse, first_kv_head, rotary)

    def attend_paged(
        self, layer: int, operands: Operands, block_table: torch.Tensor, first_kv_head: int = 0
    ) -> torch.Tensor:
        """Runs a layer's kernel on keys and values in pools of blocks; see `LayerKernels.run_paged`."""
        library, kernel = self._kernels[layer, operands.q.dtype]
        return library.attend(kernel, operands, None, first_kv_head, block_table=block_table)
