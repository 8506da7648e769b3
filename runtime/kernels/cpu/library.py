"""Calls the kernels of a CPU library: the other side of `call.h`."""

import array
import ctypes
import hashlib
import logging
import os
import re
import struct
import tempfile
import threading
from ctypes import c_char_p, c_int32

import torch

from surgeon.runtime.errors import PackageError, PatchError, TargetError, TopologyError, short_repr
from surgeon.runtime.operands import Nodes, Operands
from surgeon.runtime.package.kernel_digest import digest_symbol
from surgeon.runtime.package.manifest import CPU_ABI_VERSION
from surgeon.runtime.packed_batch import PackedBatch

_LOG = logging.getLogger("surgeon")
_SYMBOL = re.compile(r"surgeon_attention_\d+")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OK, _OUT_OF_RANGE, _BEYOND_TOPOLOGY, _OUT_OF_MEMORY, _MISSING_BLOCK = range(5)


CALL = struct.Struct("@15P11q5qf6i0q")
"""`struct Call` in templates/cpu/call/call.h.jinja, in its order: addresses, strides, lengths, the scale and the rest.

The last item is no field: like the compiler, it pads the size to a multiple of the alignment.

Packing it takes a third of the time that the fields of a `ctypes.Structure` take, which are set one by one.
"""


_WRITE = struct.Struct("@4P8q2i")
"""`struct Write` in templates/cpu/call/call.h.jinja."""


class CpuLibrary:
    """A loaded CPU library and the variant of it that this processor runs fastest.

    `variant` asks for one by name.

    Raises:
        PackageError: the bytes are no such library, or of another version.
        TargetError: the library holds no variant of that name, or the processor lacks what it needs.
    """

    def __init__(self, data: bytes, where: str, variant: str | None = None) -> None:
        library = open_library(data, where)
        check_interface(library, where)
        try:
            library.surgeon_variant.restype = c_char_p
            library.surgeon_variant.argtypes = [c_int32]
            library.surgeon_supports.argtypes = [c_int32]
            library.surgeon_write_pages.argtypes = [c_char_p]
        except AttributeError:
            raise _foreign(where) from None
        names: list[str] = []
        while (name := library.surgeon_variant(len(names))) is not None:
            names.append(name.decode())
        usable = [index for index in range(len(names)) if library.surgeon_supports(index)]
        chosen = [index for index in usable if variant in (None, names[index])]
        if not chosen:
            raise TargetError(
                f"{where}: variant {variant}",
                "one of " + ", ".join(names[index] for index in usable),
                "one that the library lacks" if variant not in names else "one that this processor cannot run",
                "leave the choice to surgeon",
            )
        self._library = library
        self.variant_number = chosen[0]
        self._where = where
        self.variant = names[chosen[0]]
        self.variants = tuple(names[index] for index in usable)
        self.refused = tuple(name for index, name in enumerate(names) if index not in usable)
        _LOG.debug("%s: runs on %s; here do not run: %s", where, self.variant, ", ".join(self.refused) or "none")

    def kernel(self, symbol: str, digest: str) -> "ctypes._NamedFuncPointer":
        """The function behind a symbol of the manifest, made for what `digest` says; see `kernel_digest`.

        Raises:
            PackageError: the library has no such function, or it was made for something else.
        """
        # The look-up also finds what other libraries export, so only names of ours are asked for.
        named = _SYMBOL.fullmatch(symbol) is not None
        function = getattr(self._library, symbol, None) if named else None
        digest_of = getattr(self._library, digest_symbol(symbol), None) if named else None
        if function is None or digest_of is None:
            raise PackageError(
                self._where, "a function of the library", short_repr(symbol), "compile the package again"
            )
        digest_of.restype = c_char_p
        made_for = digest_of().decode()
        if made_for != digest:
            raise PackageError(
                f"{self._where}: {symbol}",
                f"a kernel for this package's topology, layers, schedule and shape, of digest {digest}",
                short_repr(made_for, 70),
                "do not use this package",
            )
        found: ctypes._NamedFuncPointer = function
        found.argtypes = [c_char_p]
        found.restype = c_int32
        return found

    def attend(
        self,
        kernel: "ctypes._NamedFuncPointer",
        operands: Operands,
        lse: torch.Tensor | None = None,
        first_kv_head: int = 0,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        block_table: torch.Tensor | None = None,
        nodes: Nodes | None = None,
        batch: PackedBatch | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs a kernel on torch's thread pool.

        k and v hold the layer's KV heads from `first_kv_head` on, q their query heads. `rotary`, cosines and sines
        `[batch, length, head_dim]`, rotates q and k, which then have one length. With `block_table`, k and v are pools;
        see `LayerKernels.run_paged`. Without `nodes`, a routed layer makes its own. With `batch`, whose block table
        takes the place of `block_table`, q `[1, heads, tokens, head_dim]` has the queries of all of its sequences.
        `out` is filled if it is given.

        Raises:
            TopologyError: a row of blocks lies beyond what the topology covers.
            PatchError: a query reads a block that is not held.
        """
        q, k, v, position, cache_leftpad, scale, *_ = operands
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
        sequences, heads, q_length, head_dim = q.shape
        if out is None:
            out = torch.empty((sequences, q_length, heads, head_dim), dtype=q.dtype, device="cpu")
        if batch is not None:
            sequences, q_length, block_table = len(batch.position), batch.most_queries, batch.block_table
        if block_table is None:
            k_length, max_blocks, pool_blocks = k.shape[2], 0, 0
        else:
            k, v, block_table = k.contiguous(), v.contiguous(), block_table.contiguous()
            k_length, max_blocks, pool_blocks = block_table.shape[2] * k.shape[1], block_table.shape[2], k.shape[0]
        positions = _positions(position, sequences, k_length - q_length)
        cache_leftpads = _positions(cache_leftpad, sequences, 0)
        dense_tails = _positions(None if batch is None else batch.dense_tail, sequences, operands.dense_tail)
        cos, sin = rotary or (None, None)
        rotated_k = None if cos is None else torch.empty(k.shape, dtype=k.dtype, device="cpu")
        call = CALL.pack(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            _address(lse),
            _address(positions),
            _address(cache_leftpads),
            _address(dense_tails),
            _address(None if batch is None else batch.query_start),
            _address(cos),
            _address(sin),
            _address(rotated_k),
            _address(block_table),
            _address(nodes and nodes.values),
            _address(nodes and nodes.written),
            *q.stride()[:3],
            *(k.stride()[:3] if block_table is None else (0, 0, head_dim)),
            *(v.stride()[:3] if block_table is None else (0, 0, head_dim)),
            *((0, 0) if cos is None else cos.stride()[:2]),
            sequences,
            q_length,
            k_length,
            max_blocks,
            pool_blocks,
            scale,
            CODES[q.dtype],
            self.variant_number,
            torch.get_num_threads(),
            first_kv_head,
            k.shape[1] if block_table is None else block_table.shape[1],
            batch is not None and not batch.has_holes,
        )
        status = kernel(call)
        if status != _OK:
            raise _fault(status, q_length, k_length, position)
        return out

    def write_pages(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes keys and values into pages, on torch's thread pool; see `LayerKernels.write_pages`.

        Raises:
            PatchError: a slot lies behind the pages.
        """
        k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (k, v))
        write = _WRITE.pack(
            k.data_ptr(),
            v.data_ptr(),
            pages.data_ptr(),
            slots.data_ptr(),
            *k.stride()[:2],
            *v.stride()[:2],
            len(slots),
            pages.shape[0],
            pages.shape[2],
            pages.shape[1],
            k.element_size(),
            torch.get_num_threads(),
        )
        if self._library.surgeon_write_pages(write) != _OK:
            raise PatchError(
                "write: slots",
                f"slots below {pages.shape[0] * pages.shape[2]}, those of the pages",
                str(int(slots.max())),
                "pass the slots of these pages",
            )


def check_interface(library: ctypes.CDLL, where: str) -> None:
    """Refuses a library that takes calls in another form.

    Raises:
        PackageError: it is of another version, or not one of surgeon's.
    """
    try:
        _check_equal(where, "interface version {}", CPU_ABI_VERSION, library.surgeon_abi_version())
        _check_equal(where, "calls of {} bytes", CALL.size, library.surgeon_call_bytes())
    except AttributeError:
        raise _foreign(where) from None


def _foreign(where: str) -> PackageError:
    return PackageError(where, "a library made by surgeon", "one without its entry points", "compile the package again")


def _check_equal(where: str, what: str, expected: int, found: int) -> None:
    if found != expected:
        remedy = "compile the package with this version of surgeon"
        raise PackageError(where, what.format(expected), what.format(found), remedy)


def _positions(tensor: torch.Tensor | None, sequences: int, default: int) -> "torch.Tensor | array.array[int]":
    if tensor is None:
        return array.array("q", [default] * sequences)
    return tensor if tensor.dtype is torch.int64 and tensor.is_contiguous() else tensor.to(torch.int64).contiguous()


def _address(memory: "torch.Tensor | array.array[int] | None") -> int:
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, torch.Tensor) else memory.buffer_info()[0]


def _fault(status: int, q_length: int, k_length: int, position: torch.Tensor | None) -> Exception:
    if status == _OUT_OF_RANGE:
        positions = "Sk − Sq" if position is None else str(position.tolist())
        return TopologyError(
            "attention: position, cache_leftpad",
            f"cache_leftpad ≥ 0 and 0 ≤ position ≤ {k_length} − {q_length} (keys − queries)",
            f"position {positions}",
            "pass the index in k of each sequence's first query's own key",
        )
    if status == _BEYOND_TOPOLOGY:
        return TopologyError(
            "attention",
            "a sequence within the topology's blocks (beyond: error)",
            "a longer one",
            'shorten it, or compile a topology with "beyond" set to "window" or "dense"',
        )
    if status == _MISSING_BLOCK:
        return PatchError(
            "attention: block_table",
            "a slot for every block that the queries read",
            "a block that the cache has dropped, or a slot that it does not have",
            "read no rows before those that the cache was trimmed for",
        )
    return MemoryError("attention: no memory for the kernel's workspace")


_opened: dict[bytes, ctypes.CDLL] = {}
_opening = threading.Lock()


def open_library(data: bytes, where: str) -> ctypes.CDLL:
    """Loads a library from the very bytes that were verified, once. torch is loaded, so both share its OpenMP pool.

    Raises:
        PackageError: the bytes are no library for this machine.
    """
    digest = hashlib.sha256(data).digest()
    with _opening:
        if digest not in _opened:
            try:
                _opened[digest] = _open_memory(data) if hasattr(os, "memfd_create") else _open_file(data)
            except OSError as error:
                remedy = "compile the package on a machine of this kind"
                raise PackageError(where, "a library for this machine", str(error)[:200], remedy) from None
        return _opened[digest]


def _open_memory(data: bytes) -> ctypes.CDLL:
    # The descriptor stays open: the linker knows a library by its name, and would take the next file under the same
    # number for this one.
    descriptor = os.memfd_create("surgeon-attention")
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(data)
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")


def _open_file(data: bytes) -> ctypes.CDLL:
    with tempfile.NamedTemporaryFile(prefix="surgeon-", suffix=".so") as file:
        file.write(data)
        file.flush()
        return ctypes.CDLL(file.name)
