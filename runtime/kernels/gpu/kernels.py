"""The kernels of a package on one GPU: chosen, checked against the launch contract, loaded and launched."""

import logging
from collections.abc import Mapping, Sequence

import torch

from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.kernels.gpu.driver import Driver, Function
from surgeon.runtime.kernels.gpu.kernel import Kernel
from surgeon.runtime.kernels.gpu.load import DTYPES, check_entry, load_kernel, no_pages
from surgeon.runtime.kernels.gpu.open_driver import open_driver
from surgeon.runtime.kernels.gpu.routing import PARTS, LayerRoutes, attend_chosen, load_routes, router_kernels
from surgeon.runtime.kernels.gpu.segment_tables import LoadedTable, load_tables
from surgeon.runtime.kernels.gpu.targets import choose_target, target_of
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.interface import ALIGNMENT, PAGE_STRIDES, PAGED, STRIDES
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target
from surgeon.runtime.packed_batch import DeviceBatch

_LOG = logging.getLogger("surgeon")
_MAX_SPLITS = 128
_PROGRAMS_A_PROCESSOR = 2  # in a decoding kernel, so that one loads while another computes
_STRIDES = tuple(stride.name for stride in STRIDES)
_PAGE_STRIDES = tuple(stride.name for stride in PAGE_STRIDES)


class GpuKernels:
    """A package's kernels in the memory of one GPU that has this number of `processors`.

    Raises:
        PackageError: a kernel breaks the launch contract, or the driver does not load it.
        TargetError: the device cannot hold a kernel, or there is no driver.
    """

    def __init__(
        self, files: PackageFiles, target: Target, device: int, processors: int, strict: bool, driver: Driver
    ) -> None:
        manifest = files.manifest
        self._kernels: dict[tuple[str, int, torch.dtype], list[Kernel]] = {}  # several if heads have their own
        self._strict = strict
        self._device = device
        self._programs = _PROGRAMS_A_PROCESSOR * processors
        self._warned: set[str] = set()
        self._block_size = manifest.block_size
        self._max_keys = manifest.num_blocks * manifest.block_size if manifest.beyond == "error" else None
        self.driver = driver.name
        entries = [entry for entry in manifest.kernels if entry.target == str(target)]
        for index, entry in enumerate(manifest.kernels):
            if entry.target == str(target):
                check_entry(entry, manifest, f"{files.folder}: kernels[{index}]")
        functions: dict[KernelEntry, Function] = {}  # several entries may share their code
        for entry in entries:
            kernel = load_kernel(entry, files, device, processors, driver, functions)
            for layer in entry.layers:
                self._kernels.setdefault((entry.phase, layer, DTYPES[entry.dtype]), []).append(kernel)
        self.dtypes: tuple[torch.dtype, ...] = tuple(
            dtype for dtype in DTYPES.values() if ("prefill", manifest.layers[0], dtype) in self._kernels
        )
        self._tables: dict[tuple[str, int], LoadedTable] = load_tables(files, entries, device)
        self._routes: dict[int, LayerRoutes] = load_routes(files, device) if entries else {}
        self._router_kernels = {
            (layer, dtype): router_kernels(self._kernels, layer, dtype, f"{files.folder}: kernels for {target}")
            for layer in self._routes
            for dtype in self.dtypes
        }

    def attend(
        self,
        layer: int,
        operands: Operands,
        lse: torch.Tensor | None = None,
        first_kv_head: int = 0,
    ) -> torch.Tensor:
        """Queues a layer's kernels on the current stream.

        The tensors hold the layer's KV heads from `first_kv_head` on, as many as k has, and their query heads.

        Positions given as tensors are not checked, since that would wait for the device: a position outside k reads
        memory that does not belong to k. If the topology refuses queries beyond it, such queries give NaN.

        Raises:
            PatchError: in strict mode, a tensor's address or strides do not suit the kernel.
            TopologyError: no position is given, and there are fewer keys than queries or more than the topology covers.
            TargetError: the driver refuses the launch.
        """
        q, k, v, position, cache_leftpad, scale, *_ = operands
        batch, heads, q_length, head_dim = q.shape
        kv_heads, k_length = k.shape[1:3]
        self._check_lengths(q_length, k_length, position, cache_leftpad)
        out = q.new_empty((batch, q_length, heads, head_dim))
        if out.numel() == 0:
            return out
        q, k, v = (self._fitting(name, tensor) for name, tensor in (("q", q), ("k", k), ("v", v)))
        positions = _positions(position, q, k_length - q_length)
        cache_leftpads = _positions(cache_leftpad, q, 0)
        values: dict[str, int | float] = {
            "q": q.data_ptr(),
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "out": out.data_ptr(),
            "lse": 0 if lse is None else lse.data_ptr(),
            "cache_leftpad": cache_leftpads.data_ptr(),
            "position": positions.data_ptr(),
            "num_queries": q_length,
            "dense_tail": operands.dense_tail,
            "first_kv_head": first_kv_head,
            "num_kv_heads": kv_heads,
            "write_lse": int(lse is not None),
            "scale": scale,
            "global_scratch": 0,
            "profile_scratch": 0,
        }
        values |= zip(_STRIDES, (*_strides(q), *_strides(k), *_strides(v)), strict=True)
        lengths = {"query_heads": heads, "key_value_heads": kv_heads, "batch": batch, "one": 1}
        stream = torch.cuda.current_stream(self._device).cuda_stream
        routes = self._routes.get(layer)
        if routes is not None and q_length < k_length:
            _LOG.debug("layer %d makes the nodes of %d keys anew", layer, k_length)
        decode = self._kernels.get(("decode", layer, q.dtype), ())
        combine = self._kernels.get(("combine", layer, q.dtype), ())
        if q_length > 1 or not decode or not combine:
            if routes is not None:
                partial, partial_lse = _partial(q, q_length)
                values |= {"partial": partial.data_ptr(), "partial_lse": partial_lse.data_ptr()}
                values |= {"num_parts": 1, "num_places": q_length, "first_place": 0}
                values |= self._table("choose", layer)
                attend_chosen(self._router_kernels[layer, q.dtype], routes, lengths, stream, values, q, k)
            values |= self._table("prefill", layer)
            if self._max_keys is not None:
                out.fill_(torch.nan)
            prefill = self._kernels["prefill", layer, q.dtype]
            self._prefill(prefill, lengths, stream, values, q, q_length, operands.dense_tail)
            return out
        splits = self._splits(batch * kv_heads, k_length)
        places = splits + (PARTS if routes is not None else 0)
        partial, partial_lse = _partial(q, places)
        values |= {
            "partial": partial.data_ptr(),
            "partial_lse": partial_lse.data_ptr(),
            "num_splits": places,
        }
        values |= self._table("decode", layer)
        if routes is not None:
            values |= {"num_parts": PARTS, "num_places": places, "first_place": splits}
            attend_chosen(self._router_kernels[layer, q.dtype], routes, lengths, stream, values, q, k)
        lengths["splits"] = splits
        for kernel in (*decode, *combine):
            kernel.launch(lengths, stream, values, q)
        return out

    def attend_pages(
        self,
        layer: int,
        batch: DeviceBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        first_kv_head: int = 0,
    ) -> None:
        """Queues a layer's kernels for a batch on the current stream; see `LayerKernels.run_pages`.

        Grids follow from shapes and the batch's maxima alone. Positions are not checked, as in `attend`.

        Raises:
            TargetError: the package has no kernels for pages, or the driver refuses the launch.
            PatchError: a tensor's address or strides do not suit the kernels.
        """
        prefill, decode, combine = (
            self._kernels.get((f"{PAGED}{phase}", layer, q.dtype), ()) for phase in ("prefill", "decode", "combine")
        )
        if not prefill:
            raise no_pages("attention", f"none for {q.dtype}")
        if q.numel() == 0:
            return
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            if not _fits(tensor):
                raise _misfit(name, tensor, "pass tensors and pages that are aligned")
        (sequences, heads), kv_heads = (len(batch.lengths), q.shape[1]), k.shape[1]
        values: dict[str, int | float] = {
            "q": q.data_ptr(),
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "out": out.data_ptr(),
            "query_start": batch.query_start.data_ptr(),
            "lengths": batch.lengths.data_ptr(),
            "dense_from": batch.dense_from.data_ptr(),
            "block_table": batch.block_table.data_ptr(),
            "block_table_stride": batch.block_table.stride(0),
            "page_shift": batch.page_tokens.bit_length() - 1,
            "first_kv_head": first_kv_head,
            "num_kv_heads": kv_heads,
            "scale": scale,
            "global_scratch": 0,
            "profile_scratch": 0,
        }
        values |= zip(_PAGE_STRIDES, (*_strides(q), *_strides(k)), strict=True)
        lengths = {"query_heads": heads, "key_value_heads": kv_heads, "batch": sequences, "one": 1}
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if self._max_keys is not None:
            out.fill_(torch.nan)
        if decode:  # of the sequences that have one query
            splits = max(1, min(self._programs // (sequences * kv_heads), _MAX_SPLITS))  # at every length the same
            partial = q.new_empty((sequences, heads, splits, q.shape[2]), dtype=torch.float32)
            partial_lse = q.new_empty((sequences, heads, splits), dtype=torch.float32)
            values |= {"partial": partial.data_ptr(), "partial_lse": partial_lse.data_ptr(), "num_splits": splits}
            values |= self._table("paged_decode", layer)
            for kernel in (*decode, *combine):
                kernel.launch({**lengths, "splits": splits}, stream, values, q)
        if not decode or batch.most_queries > 1:
            values |= self._table("paged_prefill", layer)
            self._prefill(prefill, lengths, stream, values, q, batch.most_queries, dense_tail=1)

    def _prefill(
        self,
        kernels: Sequence[Kernel],
        lengths: Mapping[str, int],
        stream: int,
        values: Mapping[str, int | float],
        q: torch.Tensor,
        queries: int,
        dense_tail: int,
    ) -> None:
        """Launches a layer's prefill kernels for the heads that the tensors hold, with `queries` a sequence at most."""
        heads = lengths["query_heads"]
        first_head = int(values["first_kv_head"]) * heads // lengths["key_value_heads"]
        for kernel in kernels:
            own = range(max(first_head, kernel.heads.start), min(first_head + heads, kernel.heads.stop))
            if own:
                tiles = row_tiles(queries, kernel.tile_rows, self._block_size, dense_tail)
                grid = {**lengths, "query_heads": len(own) // kernel.program_heads, "row_tiles": tiles}
                kernel.launch(grid, stream, values, q)

    def _table(self, phase: str, layer: int) -> Mapping[str, int]:
        """The table's arguments for a kernel that reads one, none for any other."""
        table = self._tables.get((phase, layer))
        return {} if table is None else table.arguments

    def _splits(self, groups: int, k_length: int) -> int:
        """The number of programs that share a KV head's keys: enough to fill the device, each with a block or more."""
        return max(1, min(self._programs // groups, -(-k_length // self._block_size), _MAX_SPLITS))

    def _check_lengths(
        self, q_length: int, k_length: int, position: torch.Tensor | None, cache_leftpad: torch.Tensor | None
    ) -> None:
        if position is not None:
            return
        if q_length > k_length:
            raise TopologyError(
                "attention: position", f"at most {k_length} queries, as keys", str(q_length), "pass every key so far"
            )
        if cache_leftpad is None and self._max_keys is not None and k_length > self._max_keys:
            raise TopologyError(
                "attention",
                f"at most {self._max_keys} tokens, which the topology covers (beyond: error)",
                str(k_length),
                'shorten the sequence, or compile a topology with "beyond" set to "window" or "dense"',
            )

    def _fitting(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of it if its address or strides do not meet the kernels' preconditions."""
        if _fits(tensor):
            return tensor
        if self._strict:
            raise _misfit(name, tensor, "pass a contiguous copy, or load the package without strict")
        if name not in self._warned:
            self._warned.add(name)
            _LOG.warning("attention: %s is copied at every call: its address or strides do not fit the kernels", name)
        return tensor.clone(memory_format=torch.contiguous_format)


def open_gpu(files: PackageFiles, device: torch.device, strict: bool) -> GpuKernels:
    """Loads a package's kernels into a CUDA or HIP device.

    Raises:
        TargetError: the package has no kernels for the device, or there is no driver.
        PackageError: a kernel breaks the launch contract, or the driver does not load it.
    """
    target = choose_target(files.manifest, target_of(device), f"{files.folder} on {device}")
    assert device.index is not None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return GpuKernels(files, target, device.index, processors, strict, open_driver(target.backend))


def row_tiles(q_length: int, tile_rows: int, block_size: int, dense_tail: int) -> int:
    """The number of programs that share a head's queries in a prefill kernel whose tiles have `tile_rows` of them.

    Tiles begin at multiples of their size in the sequence; if the first query does not, there is one more tile. If the
    dense rows of blocks begin inside a tile, it has two programs.
    """
    may_share = tile_rows > block_size and dense_tail > -block_size
    return -(-q_length // tile_rows) + 1 + may_share


def _partial(q: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the results and the log-sum-exp of parts of the keys, `places` of each head."""
    batch, heads, _, head_dim = q.shape
    results = q.new_empty((batch, heads, places, head_dim), dtype=torch.float32)
    return results, q.new_empty((batch, heads, places), dtype=torch.float32)


def _strides(tensor: torch.Tensor) -> Sequence[int]:
    """The strides in elements but for the last, with 0 for an axis of length 1, whose stride is arbitrary."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False)]


def _fits(tensor: torch.Tensor) -> bool:
    """True if a tensor's address and strides meet the kernels' preconditions."""
    numbers = (tensor.data_ptr(), *_strides(tensor))
    return tensor.stride(-1) == 1 and not any(number % ALIGNMENT for number in numbers)


def _misfit(name: str, tensor: torch.Tensor, remedy: str) -> PatchError:
    return PatchError(
        f"attention: {name}",
        f"an address that is a multiple of {ALIGNMENT}, strides that are multiples of {ALIGNMENT} elements, "
        "and stride 1 last",
        f"address {tensor.data_ptr():#x}, strides {tuple(tensor.stride())}",
        remedy,
    )


def _positions(tensor: torch.Tensor | None, like: torch.Tensor, default: int) -> torch.Tensor:
    if tensor is None:
        return like.new_full((like.shape[0],), default, dtype=torch.int64)
    return tensor.to(device=like.device, dtype=torch.int64).contiguous()
