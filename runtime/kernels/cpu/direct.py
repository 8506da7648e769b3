"""The direct op of a package: a torch op in C++ that runs a layer's kernel without Python, where a call is plain.

A short call's time is otherwise that of the Python around it, which a model's weights push out of the CPU's caches. The
op returns None for whatever it does not take, and the caller then goes the way through Python, which also says what is
wrong with a call. Both give the same bits.
"""

import ctypes
import itertools
import logging
import struct
import threading
import weakref
from collections.abc import Callable
from ctypes import c_char_p, c_int64
from dataclasses import dataclass
from functools import partial

import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.cpu.library import CODES, check_interface, open_library

ANY_NUMBER = 2**62

DirectCall = Callable[..., torch.Tensor | None]
"""Takes what `Operands` holds, in its order; None where the call is not plain, or wrong.

A further argument is the number of keys that the call must have.
"""

_LOG = logging.getLogger("surgeon")
_LAYER = struct.Struct("@3P3q4i0q")
"""`struct DirectLayer` in templates/cpu/call/direct.cpp.jinja; see `library.CALL` for the last item."""

_SCHEMA = (
    "(int layer, Tensor q, Tensor k, Tensor v, Tensor? position, Tensor? cache_leftpad, float scale, int dense_rows, "
    "int tokens_ahead, int keys=-1) -> Tensor?"
)
# Whoever else takes part in a call is to see the op surgeon::attention: modes, transforms, tracers, other devices.
_OTHERS = (
    "CompositeExplicitAutograd",
    "AutocastCPU",
    "AutocastCUDA",
    "FuncTorchDynamicLayerFrontMode",
    "Functionalize",
    "Python",
    "PreDispatch",
    "Tracer",
)


@dataclass(frozen=True)
class DirectLayer:
    """A layer as the op runs it: its kernels by dtype, the heads of a call, and the variant.

    `most_queries` is, by dtype, the most queries of a call that needs no choice between the kernel and torch.
    """

    kernels: dict[torch.dtype, "ctypes._NamedFuncPointer"]
    most_queries: dict[torch.dtype, int]
    num_heads: int
    first_kv_head: int
    num_kv_heads: int
    variant: int


class DirectOp:
    """The op of one library, which several packages may share.

    Raises:
        PackageError: the library is damaged, of another version, or not for this torch.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self._library = open_library(data, where)
        check_interface(self._library, where)
        try:
            fits = self._library.surgeon_layer_bytes() == _LAYER.size
            self._library.surgeon_implement.argtypes = [c_char_p]
            self._library.surgeon_add_layer.argtypes = [c_char_p]
            self._library.surgeon_add_layer.restype = c_int64
            self._library.surgeon_remove_layer.argtypes = [c_int64]
        except AttributeError:
            fits = False
        op = _op_of(self._library) if fits else None
        if op is None:
            raise PackageError(where, "the library of an op for this torch", "another one", "compile the package again")
        self._op = op

    def bind(self, layer: DirectLayer, owner: object) -> DirectCall | None:
        """A call of one layer, for as long as `owner` lives; None if there is no room for more layers."""
        kernels = (layer.kernels.get(dtype) for dtype in CODES)
        number = self._library.surgeon_add_layer(
            _LAYER.pack(
                *(ctypes.cast(kernel, ctypes.c_void_p).value or 0 if kernel else 0 for kernel in kernels),
                *(layer.most_queries.get(dtype, 0) for dtype in CODES),
                layer.num_heads,
                layer.first_kv_head,
                layer.num_kv_heads,
                layer.variant,
            )
        )
        if number == 0:
            return None
        weakref.finalize(owner, self._library.surgeon_remove_layer, number).atexit = False
        return partial(self._op, number)


def open_direct(data: bytes | None, where: str) -> DirectOp | None:
    """The op in a library's bytes; None, which the debug log explains, where it cannot be used."""
    if data is None:
        _LOG.debug("%s: not in the package, so every call goes through Python", where)
        return None
    try:
        op = DirectOp(data, where)
    except PackageError as error:
        _LOG.debug("every call goes through Python: %s", error)
        return None
    _LOG.debug("%s: plain calls go without Python", where)
    return op


_numbers = itertools.count()
_ops: dict[int, DirectCall | None] = {}  # by the library's handle: each has one op, for good
_defining = threading.Lock()
_DEFINITIONS = torch.library.Library("surgeon", "FRAGMENT")


def _op_of(library: ctypes.CDLL) -> DirectCall | None:
    with _defining:
        if library._handle not in _ops:
            _ops[library._handle] = _define(library)
        return _ops[library._handle]


def _define(library: ctypes.CDLL) -> DirectCall | None:
    name = f"attention_direct_{next(_numbers)}"
    _DEFINITIONS.define(name + _SCHEMA)
    for key in _OTHERS:
        _DEFINITIONS.impl(name, _leave, key)
    if library.surgeon_implement(name.encode()) != 0:
        return None
    op = getattr(torch.ops.surgeon, name).default
    called: DirectCall = getattr(op, "_op", op)  # what OpOverload calls, without its frame
    return called


def _leave(*_: object) -> None:
    return None
