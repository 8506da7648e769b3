"""A package's kernels on the CPU, by layer and dtype."""

import logging
import threading

import torch

from surgeon.runtime.errors import PackageError, TargetError, short_repr
from surgeon.runtime.kernels.cpu import sdpa
from surgeon.runtime.kernels.cpu.dense_rows import DenseRows
from surgeon.runtime.kernels.cpu.direct import ANY_NUMBER, DirectCall, DirectLayer, open_direct
from surgeon.runtime.kernels.cpu.library import CpuLibrary
from surgeon.runtime.kernels.cpu.rates import processor_features, processor_level
from surgeon.runtime.operands import Nodes, Operands
from surgeon.runtime.package.kernel_digest import kernel_digest
from surgeon.runtime.package.manifest import DIRECT_LIBRARY
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.packed_batch import PackedBatch

_LOG = logging.getLogger("surgeon")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
        digests = {layers: _digest(files, layers) for layers in {kernel.layers for kernel in kernels if kernel.layers}}
        self._kernels = {}
        for kernel in kernels:
            if kernel.dtype not in _DTYPES:
                raise PackageError(
                    f"{files.folder}: kernels", "a known dtype", short_repr(kernel.dtype), "compile the package again"
                )
            library = libraries[kernel.file]
            for layer in kernel.layers:
                function = library.kernel(kernel.symbol, digests[kernel.layers])
                self._kernels[layer, _DTYPES[kernel.dtype]] = library, function
        self.block_size = manifest.block_size
        self._any_library = first = next(iter(libraries.values()))
        self.variant: str = first.variant
        self.variants: tuple[str, ...] = first.variants
        self.dtypes: tuple[torch.dtype, ...] = tuple(
            dtype for dtype in _DTYPES.values() if (manifest.layers[0], dtype) in self._kernels
        )
        # A matrix unit that this process may not use is not torch's either.
        level = processor_level(processor_features(), {"amx"} if "x86_64_amx" in first.refused else ())
        schedules = {layer: schedule.heads for layer, schedule in files.schedules.items()}
        self.dense_rows = DenseRows.of(manifest, schedules, first.variant, level)
        self._routed = frozenset(manifest.routed)
        self._torch_dtypes = frozenset(_DTYPES[dtype] for dtype in self.dense_rows.torch_dtypes)
        self._group = manifest.model.num_attention_heads // manifest.model.num_key_value_heads
        self._direct_op = open_direct(files.files.get(DIRECT_LIBRARY), f"{files.folder}/{DIRECT_LIBRARY}")
        self._direct: dict[tuple[int, range], DirectCall | None] = {}
        self._binding = threading.Lock()

    def direct(self, layer: int, kv_heads: range) -> DirectCall | None:
        """A layer's call without Python for some of its KV heads, or None; it holds for as long as these kernels."""
        with self._binding:
            if (layer, kv_heads) not in self._direct:
                self._direct[layer, kv_heads] = self._bind(layer, kv_heads)
            return self._direct[layer, kv_heads]

    def _bind(self, layer: int, kv_heads: range) -> DirectCall | None:
        kernels = {dtype: self._kernels[layer, dtype] for dtype in self.dtypes if (layer, dtype) in self._kernels}
        if self._direct_op is None or not kernels or layer in self._routed:
            return None
        bound = DirectLayer(
            kernels={dtype: kernel for dtype, (_, kernel) in kernels.items()},
            most_queries={dtype: self._most_direct_queries(dtype) for dtype in kernels},
            num_heads=self._group * len(kv_heads),
            first_kv_head=kv_heads.start,
            num_kv_heads=len(kv_heads),
            variant=next(library for library, _ in kernels.values()).variant_number,
        )
        return self._direct_op.bind(bound, self)

    def _most_direct_queries(self, dtype: torch.dtype) -> int:
        """The most queries of calls that are never left to torch."""
        if dtype not in self._torch_dtypes:
            return ANY_NUMBER
        return 0 if self.dense_rows.torch_decodes_faster(_NAMES[dtype]) else 1

    def attend(
        self,
        layer: int,
        operands: Operands,
        lse: torch.Tensor | None = None,
        first_kv_head: int = 0,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        nodes: Nodes | None = None,
    ) -> torch.Tensor:
        """Runs a layer's kernel, or dense attention where it is equivalent and faster; see `CpuLibrary.attend`."""
        queries, keys = operands.q.shape[2], operands.k.shape[2]
        if operands.q.dtype in self._torch_dtypes and lse is None:
            end = sdpa.visible_end(operands)
            if end is not None and queries <= end <= min(self._dense_tokens(layer, operands, end), keys):
                dtype = _NAMES[operands.q.dtype]
                if self.dense_rows.torch_is_faster(dtype, queries, end):
                    time = 1 / self.dense_rows.rate(dtype, queries, end)
                    _LOG.debug(
                        "layer %d: %s would take %.2g of dense attention's time in %s", layer, self.variant, time, dtype
                    )
                    return sdpa.attend(sdpa.rotated(operands, *rotary) if rotary else operands, end)
        library, kernel = self._kernels[layer, operands.q.dtype]
        if layer in self._routed:
            if rotary:  # heads choose by rotated queries
                operands, rotary = sdpa.rotated(operands, *rotary), None
            if nodes is None and queries < keys:
                _LOG.debug("layer %d makes the nodes of %d keys anew, which a SurgeonCache would keep", layer, keys)
        return library.attend(kernel, operands, lse, first_kv_head, rotary, nodes=nodes)

    def _dense_tokens(self, layer: int, operands: Operands, end: int) -> int:
        """The tokens from the start that a layer sees densely in a call of sequences that end at `end`."""
        first = operands.first_dense_row(end, self.block_size)
        if first is not None and first <= (end - operands.q.shape[2]) // self.block_size:
            return self.dense_rows.most_tokens
        return self.dense_rows.tokens[layer]

    def attend_paged(
        self,
        layer: int,
        operands: Operands,
        block_table: torch.Tensor,
        first_kv_head: int = 0,
        nodes: Nodes | None = None,
    ) -> torch.Tensor:
        """Runs a layer's kernel on keys and values in pools of blocks; see `LayerKernels.run_paged`."""
        library, kernel = self._kernels[layer, operands.q.dtype]
        return library.attend(kernel, operands, None, first_kv_head, block_table=block_table, nodes=nodes)

    def attend_packed(
        self,
        layer: int,
        operands: Operands,
        batch: PackedBatch,
        out: torch.Tensor,
        first_kv_head: int = 0,
        nodes: Nodes | None = None,
    ) -> None:
        """Runs a layer's kernel on a batch, with q as one sequence of all queries; see `LayerKernels.run_packed`."""
        library, kernel = self._kernels[layer, operands.q.dtype]
        library.attend(kernel, operands, None, first_kv_head, nodes=nodes, batch=batch, out=out)

    def write_pages(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes keys and values into pages; see `LayerKernels.write_pages`."""
        self._any_library.write_pages(k, v, slots, pages)


def _digest(files: PackageFiles, layers: tuple[int, ...]) -> str:
    """The digest of the kernel that the package needs for layers that share one."""
    manifest = files.manifest
    schedule = files.schedules[layers[0]]
    return kernel_digest(
        manifest.topology_sha256,
        layers,
        schedule.heads,
        dtypes={kernel.dtype for kernel in manifest.kernels if kernel.target == "cpu"},
        last_readers=schedule.last_readers,
        num_key_value_heads=manifest.model.num_key_value_heads,
        head_dim=manifest.model.head_dim,
        block_size=manifest.block_size,
        num_rows=files.num_rows,
    )
