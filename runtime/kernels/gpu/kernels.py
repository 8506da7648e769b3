"""The kernels of a package on one GPU: chosen, checked against the launch contract, loaded and launched."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from surgeon.runtime.errors import PackageError, PatchError, TargetError, TopologyError, short_repr
from surgeon.runtime.kernels.gpu.driver import Driver, Function
from surgeon.runtime.kernels.gpu.kernel import Kernel
from surgeon.runtime.kernels.gpu.open_driver import open_driver
from surgeon.runtime.kernels.gpu.routing import PARTS, LayerRoutes, attend_chosen, load_routes, router_kernels
from surgeon.runtime.kernels.gpu.segment_tables import LoadedTable, load_tables
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.interface import ALIGNMENT, STRIDES, check_interface
from surgeon.runtime.package.manifest import KernelEntry, Manifest
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target

_LOG = logging.getLogger("surgeon")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_AGAIN = "compile the package with this version of surgeon"
_MAX_THREADS = 1024
_MAX_SCRATCH_BYTES = 4096
_MAX_SPLITS = 128
_PROGRAMS_A_PROCESSOR = 2  # in a decoding kernel, so that one loads while another computes
_STRIDES = tuple(stride.name for stride in STRIDES)


def target_of(device: torch.device) -> Target:
    """The target that code for a device is compiled for."""
    if torch.version.hip:
        # The name may carry features that do not matter here: gfx90a:sramecc+:xnack-.
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", f"{major}{minor}")


def choose_target(manifest: Manifest, own: Target, where: str) -> Target:
    """The packaged target to run on a device: its own, or for compute capability 8.x the nearest lower 8.x.

    Code for compute capability 9.0 or later, or for HIP, runs only on the target that it was compiled for.

    Raises:
        TargetError: the package has no such target; the message names those that it has.
    """
    there = [Target.parse(name) for name in manifest.targets]
    if own in there:
        return own
    if own.backend == "cuda" and own.arch.startswith("8"):
        lower = [target for target in there if target.backend == "cuda" and "80" <= target.arch < own.arch]
        if lower:
            return max(lower)
    raise TargetError(
        where,
        f"kernels for {own}, this device's target",
        "only " + ", ".join(manifest.targets) if manifest.targets else "none",
        f"compile the package again with --target {own}",
    )


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
                _check(entry, manifest, f"{files.folder}: kernels[{index}]")
        functions: dict[KernelEntry, Function] = {}  # several entries may share their code
        for entry in entries:
            kernel = _load(entry, files, device, processors, driver, functions)
            for layer in entry.layers:
                self._kernels.setdefault((entry.phase, layer, _DTYPES[entry.dtype]), []).append(kernel)
        self.dtypes: tuple[torch.dtype, ...] = tuple(
            dtype for dtype in _DTYPES.values() if ("prefill", manifest.layers[0], dtype) in self._kernels
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
            first_head = first_kv_head * heads // kv_heads
            for kernel in self._kernels["prefill", layer, q.dtype]:
                own = range(max(first_head, kernel.heads.start), min(first_head + heads, kernel.heads.stop))
                if not own:
                    continue
                lengths["query_heads"] = len(own) // kernel.program_heads
                lengths["row_tiles"] = row_tiles(q_length, kernel.tile_rows, self._block_size, operands.dense_tail)
                kernel.launch(lengths, stream, values, q)
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
        strides = _strides(tensor)
        numbers = (tensor.data_ptr(), *strides)
        if tensor.stride(3) == 1 and not any(number % ALIGNMENT for number in numbers):
            return tensor
        if self._strict:
            raise PatchError(
                f"attention: {name}",
                f"an address that is a multiple of {ALIGNMENT}, strides that are multiples of {ALIGNMENT} elements, "
                "and stride 1 last",
                f"address {tensor.data_ptr():#x}, strides {tuple(tensor.stride())}",
                "pass a contiguous copy, or load the package without strict",
            )
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


def _check(entry: KernelEntry, manifest: Manifest, where: str) -> None:
    """Refuses a kernel that the launcher cannot launch: a wrong argument would be read as an address."""
    check_interface(entry, where, manifest.routed)
    launch = entry.launch
    if launch is None or not (
        0 < launch.threads <= _MAX_THREADS
        and launch.tile_rows > 0
        and launch.shared_bytes >= 0
        and 0 <= launch.scratch_bytes <= _MAX_SCRATCH_BYTES
    ):
        raise PackageError(f"{where}.launch", "numbers of threads, rows and bytes in range", short_repr(launch), _AGAIN)
    if entry.dtype not in _DTYPES:
        raise PackageError(f"{where}.dtype", f"one of {', '.join(_DTYPES)}", short_repr(entry.dtype), _AGAIN)
    group = manifest.model.num_attention_heads // manifest.model.num_key_value_heads
    shares = launch.program_heads
    if shares != 1 and (shares < 1 or group % shares or entry.heads or entry.phase != "prefill"):
        expected = f"1, or in a prefill kernel of all heads a number that divides {group}"
        raise PackageError(f"{where}.launch.program_heads", expected, short_repr(shares), _AGAIN)
    if entry.heads and entry.phase != "prefill":
        raise PackageError(f"{where}.heads", f"none for the phase {entry.phase}", short_repr(entry.heads), _AGAIN)
    name = _function_name(entry, not set(manifest.routed).isdisjoint(entry.layers))
    if entry.symbol != name or not entry.file.startswith(f"{Target.parse(entry.target).folder}/{name}.{entry.dtype}."):
        found = f"{entry.symbol} in {entry.file}"
        raise PackageError(f"{where}.symbol", f"{name}, in its file for {entry.dtype}", short_repr(found), _AGAIN)


def _function_name(entry: KernelEntry, routed: bool) -> str:
    """The name of the function that the compiler makes for an entry of the manifest, of layers that may be routed."""
    if entry.phase == "decode" or entry.table.startswith("prefill"):
        name = "decode" if entry.phase == "decode" else "attention_by_table"
        return f"routed_{name}" if routed else name
    if entry.phase != "prefill":
        return entry.phase
    return f"{entry.schedule}_head_{entry.heads[0]:02d}" if entry.heads else entry.schedule


def _load(
    entry: KernelEntry,
    files: PackageFiles,
    device: int,
    processors: int,
    driver: Driver,
    functions: dict[KernelEntry, Function],
) -> Kernel:
    launch = entry.launch
    assert launch is not None
    code = replace(entry, layers=(), schedule="")
    if code not in functions:
        functions[code] = driver.load(
            files.files[entry.file],
            f"{files.folder}/{entry.file}",
            entry.symbol,
            [argument.type for argument in entry.arguments],
            device,
            launch.threads,
            launch.shared_bytes,
        )
    first, end = entry.heads or (0, files.manifest.model.num_attention_heads)
    names = tuple(argument.name for argument in entry.arguments)
    function = functions[code]
    at_once = max(1, processors * function.programs_a_processor()) if launch.persistent else None
    return Kernel(
        function,
        names,
        launch.grid,
        launch.tile_rows,
        launch.scratch_bytes,
        launch.program_heads,
        range(first, end),
        at_once,
    )


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
    """The strides in elements, with 0 for an axis of length 1, whose stride is arbitrary."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False)]


def _positions(tensor: torch.Tensor | None, like: torch.Tensor, default: int) -> torch.Tensor:
    if tensor is None:
        return like.new_full((like.shape[0],), default, dtype=torch.int64)
    return tensor.to(device=like.device, dtype=torch.int64).contiguous()
