"""The kernels of a package on one GPU: found, checked against what the launcher knows, loaded and launched."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from surgeon.runtime.errors import PackageError, PatchError, TargetError, TopologyError, short_repr
from surgeon.runtime.kernels.gpu.driver import Driver, Function
from surgeon.runtime.kernels.gpu.open_driver import open_driver
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
_MAX_SPLITS = 128
_PROGRAMS_A_PROCESSOR = 2  # of a decoding kernel, so that one loads while another computes
_STRIDES = tuple(stride.name for stride in STRIDES)


def target_of(device: torch.device) -> Target:
    """The target that a device's own code is compiled for."""
    if torch.version.hip:
        # A name may go on with features that do not matter here: gfx90a:sramecc+:xnack-.
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", f"{major}{minor}")


def choose_target(manifest: Manifest, own: Target, where: str) -> Target:
    """The packaged target that a device runs: its own, or for compute capability 8.x the nearest lower 8.x.

    Code for compute capability 9.0 and later is compiled for that one alone, and so is code for HIP.

    Raises:
        TargetError: the package has none; the error names those that it has.
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


@dataclass(frozen=True)
class _Kernel:
    """A loaded kernel, the order of its arguments, how its grid is counted, and the query heads that it is for."""

    function: Function
    arguments: tuple[str, ...]
    grid: tuple[str, ...]
    tile_rows: int
    heads: range

    def launch(self, lengths: Mapping[str, int], stream: int, values: Mapping[str, int | float]) -> None:
        x, y, z = (lengths[axis] for axis in self.grid)
        self.function.launch((x, y, z), stream, [values[name] for name in self.arguments])


class GpuKernels:
    """A package's kernels in the memory of one GPU with so many `processors`.

    Raises:
        PackageError: a kernel takes what the launcher does not know, or the driver does not load it.
        TargetError: the device cannot hold a kernel, or there is no driver.
    """

    def __init__(
        self, files: PackageFiles, target: Target, device: int, processors: int, strict: bool, driver: Driver
    ) -> None:
        manifest = files.manifest
        self._kernels: dict[tuple[str, int, torch.dtype], list[_Kernel]] = {}  # several where heads have their own
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
                _check(entry, f"{files.folder}: kernels[{index}]")
        functions: dict[KernelEntry, Function] = {}  # several entries may share their code
        for entry in entries:
            kernel = _load(entry, files, device, driver, functions)
            for layer in entry.layers:
                self._kernels.setdefault((entry.phase, layer, _DTYPES[entry.dtype]), []).append(kernel)
        self.dtypes: tuple[torch.dtype, ...] = tuple(
            dtype for dtype in _DTYPES.values() if ("prefill", manifest.layers[0], dtype) in self._kernels
        )
        self._tables: dict[tuple[str, int], LoadedTable] = load_tables(files, entries, device)

    def attend(
        self,
        layer: int,
        operands: Operands,
        lse: torch.Tensor | None = None,
        first_kv_head: int = 0,
    ) -> torch.Tensor:
        """Queues a layer's kernels on the current stream.

        The tensors hold the layer's KV heads from `first_kv_head` on, as many as k has, and their query heads.

        Positions in tensors are not looked at, which would wait for the device: one outside of k reads memory that is
        not k's. Where the topology refuses what lies beyond it, such queries give NaN.

        Raises:
            PatchError: strict, and a tensor's address or strides are none that the kernel takes.
            TopologyError: no position is given, and there are fewer keys than queries or more than the topology covers.
            TargetError: the driver refuses the launch.
        """
        q, k, v, position, cache_leftpad, scale = operands
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
        decode = self._kernels.get(("decode", layer, q.dtype), ())
        combine = self._kernels.get(("combine", layer, q.dtype), ())
        if q_length > 1 or not decode or not combine:
            values |= self._table("prefill", layer)
            if self._max_keys is not None:
                out.fill_(torch.nan)
            first_head = first_kv_head * heads // kv_heads
            for kernel in self._kernels["prefill", layer, q.dtype]:
                own = range(max(first_head, kernel.heads.start), min(first_head + heads, kernel.heads.stop))
                if not own:
                    continue
                # Tiles begin at multiples of their size in the sequence: where the first query does not, there is one
                # more.
                lengths["row_tiles"] = -(-q_length // kernel.tile_rows) + 1
                kernel.launch(lengths | {"query_heads": len(own)}, stream, values)
            return out
        splits = self._splits(batch * kv_heads, k_length)
        partial = q.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
        partial_lse = q.new_empty((batch, heads, splits), dtype=torch.float32)
        values |= {
            "partial": partial.data_ptr(),
            "partial_lse": partial_lse.data_ptr(),
            "num_splits": splits,
        }
        values |= self._table("decode", layer)
        lengths["splits"] = splits
        for kernel in (*decode, *combine):
            kernel.launch(lengths, stream, values)
        return out

    def _table(self, phase: str, layer: int) -> Mapping[str, int]:
        """The arguments of a kernel that reads a table, none for one that does not."""
        table = self._tables.get((phase, layer))
        return {} if table is None else table.arguments

    def _splits(self, groups: int, k_length: int) -> int:
        """How many programs share the keys of one KV head: enough to fill the device, each with a block at least."""
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
        """The tensor, or a copy of it where its address or strides are not what the kernels rely on."""
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
        PackageError: a kernel takes what the launcher does not know, or the driver does not load it.
    """
    target = choose_target(files.manifest, target_of(device), f"{files.folder} on {device}")
    assert device.index is not None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return GpuKernels(files, target, device.index, processors, strict, open_driver(target.backend))


def _check(entry: KernelEntry, where: str) -> None:
    """Refuses a kernel that the launcher cannot launch: a wrong argument would be read as an address."""
    check_interface(entry, where)
    launch = entry.launch
    if launch is None or not (0 < launch.threads <= _MAX_THREADS and launch.tile_rows > 0 and launch.shared_bytes >= 0):
        raise PackageError(f"{where}.launch", "threads, rows and bytes that can be", short_repr(launch), _AGAIN)
    if entry.dtype not in _DTYPES:
        raise PackageError(f"{where}.dtype", f"one of {', '.join(_DTYPES)}", short_repr(entry.dtype), _AGAIN)
    if entry.heads and entry.phase != "prefill":
        raise PackageError(f"{where}.heads", f"none for the phase {entry.phase}", short_repr(entry.heads), _AGAIN)


def _load(
    entry: KernelEntry,
    files: PackageFiles,
    device: int,
    driver: Driver,
    functions: dict[KernelEntry, Function],
) -> _Kernel:
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
    return _Kernel(functions[code], names, launch.grid, launch.tile_rows, range(first, end))


def _strides(tensor: torch.Tensor) -> Sequence[int]:
    """In elements, 0 along an axis of length 1, whose stride says nothing."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False)]


def _positions(tensor: torch.Tensor | None, like: torch.Tensor, default: int) -> torch.Tensor:
    if tensor is None:
        return like.new_full((like.shape[0],), default, dtype=torch.int64)
    return tensor.to(device=like.device, dtype=torch.int64).contiguous()
