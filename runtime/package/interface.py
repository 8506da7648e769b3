"""How the GPU kernels of each phase are called: their arguments, the axes of their grids, what they rely on."""

from dataclasses import dataclass

from surgeon.runtime.package.manifest import Argument


@dataclass(frozen=True)
class Interface:
    """What a kernel function takes, in order; the three axes of its grid; the preconditions of its code.

    Strides are in elements; q, k and v have stride 1 along head_dim, everything else is contiguous. first_key and
    position are int64, tables int32, lse, partial and partial_lse float32. `write_lse` 0 leaves lse alone, which may
    then be null. q, k, v and out hold the KV heads of the layer from `first_kv_head` on, and their query heads.
    """

    arguments: tuple[Argument, ...]
    grid: tuple[str, ...]
    preconditions: tuple[str, ...]


def _pointers(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "pointer") for name in names)


def _preconditions(*pointers: str) -> tuple[str, ...]:
    """Addresses in bytes and strides in elements; `*_dim_stride`, the stride along head_dim, is no argument."""
    return (
        *(f"{name} % 16 == 0" for name in pointers),
        *(f"{argument.name} % 16 == 0" for argument in _STRIDES),
        *(f"{name}_dim_stride == 1" for name in ("q", "k", "v")),
    )


_STRIDES = tuple(
    Argument(f"{name}_{axis}_stride", "i64") for name in ("q", "k", "v") for axis in ("batch", "head", "token")
)
_TABLE = (*_pointers("table_rows", "table_plans", "table_segments"), Argument("num_table_rows", "i32"))
_FIRST_KV_HEAD = Argument("first_kv_head", "i32")
_WRITE_LSE = Argument("write_lse", "i32")
_SCALE = Argument("scale", "fp32")

PREFILL = Interface(
    arguments=(
        *_pointers("q", "k", "v", "out", "lse", "first_key", "position"),
        *_STRIDES,
        Argument("num_queries", "i32"),
        _FIRST_KV_HEAD,
        Argument("num_kv_heads", "i32"),
        _WRITE_LSE,
        _SCALE,
    ),
    grid=("query_heads", "batch", "row_tiles"),
    preconditions=_preconditions("q", "k", "v", "out"),
)

PREFILL_BY_TABLE = Interface(PREFILL.arguments + _TABLE, PREFILL.grid, PREFILL.preconditions)

DECODE = Interface(
    arguments=(
        *_pointers("q", "k", "v", "partial", "partial_lse", "first_key", "position"),
        *_STRIDES,
        _FIRST_KV_HEAD,
        _SCALE,
        *_TABLE,
    ),
    grid=("key_value_heads", "batch", "splits"),
    preconditions=_preconditions("q", "k", "v"),
)

REDUCE = Interface(
    arguments=(
        *_pointers("partial", "partial_lse", "out", "lse"),
        Argument("num_splits", "i32"),
        _WRITE_LSE,
    ),
    grid=("query_heads", "batch", "one"),
    preconditions=(),
)

INTERFACES = {
    ("prefill", False): PREFILL,
    ("prefill", True): PREFILL_BY_TABLE,
    ("decode", True): DECODE,
    ("reduce", False): REDUCE,
}
"""By the phase of a source and of its entries in the manifest, and whether they read a table of their schedule."""
