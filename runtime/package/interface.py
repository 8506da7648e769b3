"""The launch contract of the GPU kernels: their arguments, the axes of their grids and their preconditions.

The compiler builds every kernel to this contract, and the launcher runs no other kernels.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.manifest import PERSISTENT_GRID, Argument, KernelEntry

ALIGNMENT = 16
"""The number that `Interface.aligned` arguments are multiples of."""


@dataclass(frozen=True)
class Interface:
    """The arguments of a kernel function, in order, and the three axes of its grid (see `Launch`).

    Strides are in elements; q, k and v have stride 1 along head_dim, everything else is contiguous. `aligned` names the
    addresses, in bytes, and strides that are multiples of `ALIGNMENT`. `write_lse` 0 leaves lse alone, which may then
    be null. q, k, v and out hold the KV heads of the layer from `first_kv_head` on, and their query heads. `dense_tail`
    is `Operands.dense_tail`.
    """

    arguments: tuple[Argument, ...]
    grid: tuple[str, ...]
    aligned: tuple[str, ...] = ()

    @property
    def binary_arguments(self) -> tuple[Argument, ...]:
        """The arguments of the compiled code, where Triton appends two pointers to scratch memory.

        The first is null unless `Launch.scratch_bytes` is positive, the second always.
        """
        return self.arguments + SCRATCH

    @property
    def persistent(self) -> "Interface":
        """The interface of persistent programs: their tasks are the programs of this one's grid.

        There are `num_tasks`, counted along the first axis, of `num_task_heads`, then the second, of `num_sequences`,
        then the third. `tasks_taken` is 0 at the launch.
        """
        return replace(self, arguments=self.arguments + _TASKS, grid=PERSISTENT_GRID)

    @property
    def preconditions(self) -> tuple[str, ...]:
        """The conditions that the launcher ensures; `*_dim_stride`, the stride along head_dim, is not an argument."""
        tensors = [argument.name for argument in self.arguments if argument.name in ("q", "k", "v")]
        return (
            *(f"{name} % {ALIGNMENT} == 0" for name in self.aligned),
            *(f"{name}_dim_stride == 1" for name in tensors),
        )


def _pointers(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "pointer") for name in names)


POINTEES = (
    dict.fromkeys(("lse", "partial", "partial_lse", "key_centre", "key_scale"), "fp32")
    | dict.fromkeys(("cache_leftpad", "position"), "i64")
    | dict.fromkeys(("query_start", "lengths", "dense_from", "block_table"), "i32")
    | dict.fromkeys(("table_rows", "table_plans", "table_segments", "routes", "chosen", "tasks_taken"), "i32")
    | dict.fromkeys(("nodes",), "i8")
)
"""The element types of pointers; pointers that are not listed point to the kernel's own dtype."""

SCRATCH = _pointers("global_scratch", "profile_scratch")
STRIDES = tuple(
    Argument(f"{name}_{axis}_stride", "i64") for name in ("q", "k", "v") for axis in ("batch", "head", "token")
)
TABLE_POINTERS = _pointers("table_rows", "table_plans", "table_segments")
TABLE_LENGTH = Argument("num_table_rows", "i32")

_TABLE = (*TABLE_POINTERS, TABLE_LENGTH)
_TASKS = (
    *_pointers("tasks_taken"),
    Argument("num_task_heads", "i32"),
    Argument("num_sequences", "i32"),
    Argument("num_tasks", "i32"),
)
_ALIGNED_STRIDES = tuple(stride.name for stride in STRIDES)
_NUM_QUERIES = Argument("num_queries", "i32")
_DENSE_TAIL = Argument("dense_tail", "i32")
_FIRST_KV_HEAD = Argument("first_kv_head", "i32")
_WRITE_LSE = Argument("write_lse", "i32")
_SCALE = Argument("scale", "fp32")

PREFILL = Interface(
    arguments=(
        *_pointers("q", "k", "v", "out", "lse", "cache_leftpad", "position"),
        *STRIDES,
        _NUM_QUERIES,
        _DENSE_TAIL,
        _FIRST_KV_HEAD,
        Argument("num_kv_heads", "i32"),
        _WRITE_LSE,
        _SCALE,
    ),
    grid=("query_heads", "batch", "row_tiles"),
    aligned=("q", "k", "v", "out", *_ALIGNED_STRIDES),
)

PREFILL_BY_TABLE = Interface(PREFILL.arguments + _TABLE, PREFILL.grid, PREFILL.aligned)

DECODE = Interface(
    arguments=(
        *_pointers("q", "k", "v", "partial", "partial_lse", "cache_leftpad", "position"),
        *STRIDES,
        _DENSE_TAIL,
        _FIRST_KV_HEAD,
        _SCALE,
        *_TABLE,
    ),
    grid=("key_value_heads", "batch", "splits"),
    aligned=("q", "k", "v", *_ALIGNED_STRIDES),
)

COMBINE = Interface(
    arguments=(
        *_pointers("partial", "partial_lse", "out", "lse"),
        Argument("num_splits", "i32"),
        _WRITE_LSE,
    ),
    grid=("query_heads", "batch", "one"),
)

# Keys and values in pages, and the queries of all sequences one behind the other. The device describes a batch, so that
# a captured graph follows it. `lengths` and `dense_from` are those of `DeviceBatch`; a page has 2**page_shift tokens.

PAGE_STRIDES = (
    *(Argument(f"q_{axis}_stride", "i64") for axis in ("token", "head")),
    *(Argument(name, "i64") for name in ("page_stride", "page_head_stride", "page_token_stride")),  # of k and v alike
)

_ALIGNED_PAGE_STRIDES = tuple(stride.name for stride in PAGE_STRIDES)
_IN_PAGES = (
    *_pointers("query_start", "lengths", "dense_from", "block_table"),
    *PAGE_STRIDES,
    Argument("block_table_stride", "i32"),
    Argument("page_shift", "i32"),
    _FIRST_KV_HEAD,
)

PAGED_PREFILL = Interface(
    arguments=(*_pointers("q", "k", "v", "out"), *_IN_PAGES, Argument("num_kv_heads", "i32"), _SCALE),
    grid=PREFILL.grid,
    aligned=("q", "k", "v", "out", *_ALIGNED_PAGE_STRIDES),
)

PAGED_PREFILL_BY_TABLE = Interface(PAGED_PREFILL.arguments + _TABLE, PAGED_PREFILL.grid, PAGED_PREFILL.aligned)

PAGED_DECODE = Interface(
    arguments=(*_pointers("q", "k", "v", "partial", "partial_lse"), *_IN_PAGES, _SCALE, *_TABLE),
    grid=DECODE.grid,
    aligned=("q", "k", "v", *_ALIGNED_PAGE_STRIDES),
)

PAGED_COMBINE = Interface(
    arguments=(*_pointers("partial", "partial_lse", "out", "query_start"), Argument("num_splits", "i32")),
    grid=COMBINE.grid,
)

# Routed heads: what their chosen blocks give is in partial and partial_lse, from where attention goes on.

_PARTIAL = _pointers("partial", "partial_lse")
_NUM_PLACES = Argument("num_places", "i32")
_NUM_NODES = Argument("num_nodes", "i32")
_MOST_CHOSEN = Argument("most_chosen", "i32")

WRITE_NODES = Interface(
    arguments=(
        *_pointers("k", "nodes", "cache_leftpad", "position", "routes", "key_centre", "key_scale"),
        *STRIDES[3:6],
        _NUM_QUERIES,
        _NUM_NODES,
        _FIRST_KV_HEAD,
    ),
    grid=("key_value_heads", "batch", "node_tiles"),
    aligned=("k", "nodes", *_ALIGNED_STRIDES[3:6]),
)

CHOOSE = Interface(
    arguments=(
        *_pointers("q", "nodes", "chosen", "cache_leftpad", "position", "routes", "key_scale"),
        *STRIDES[:3],
        _NUM_QUERIES,
        _NUM_NODES,
        Argument("num_slots", "i32"),
        _MOST_CHOSEN,
        _DENSE_TAIL,
        _FIRST_KV_HEAD,
        *_TABLE,
    ),
    grid=("query_heads", "batch", "slot_tiles"),
    aligned=("q", "nodes", *_ALIGNED_STRIDES[:3]),
)

ATTEND_CHOSEN = Interface(
    arguments=(
        *_pointers("q", "k", "v", "chosen", "partial", "partial_lse", "cache_leftpad", "position"),
        *STRIDES,
        _NUM_QUERIES,
        _MOST_CHOSEN,
        Argument("num_parts", "i32"),
        _NUM_PLACES,
        Argument("first_place", "i32"),
        _SCALE,
    ),
    grid=("query_heads", "batch", "slot_parts"),
    aligned=("q", "k", "v", *_ALIGNED_STRIDES),
)

ROUTED_PREFILL = Interface(PREFILL.arguments + _PARTIAL, PREFILL.grid, PREFILL.aligned)
ROUTED_PREFILL_BY_TABLE = Interface(PREFILL_BY_TABLE.arguments + _PARTIAL, PREFILL.grid, PREFILL.aligned)
ROUTED_DECODE = Interface((*DECODE.arguments, _NUM_PLACES), DECODE.grid, DECODE.aligned)

INTERFACES = {
    ("prefill", False): PREFILL,
    ("prefill", True): PREFILL_BY_TABLE,
    ("decode", True): DECODE,
    ("combine", False): COMBINE,
}
"""The interfaces by phase, of a source and of its manifest entries, and by whether they read a segment table."""

PAGED_INTERFACES = {
    ("paged_prefill", False): PAGED_PREFILL,
    ("paged_prefill", True): PAGED_PREFILL_BY_TABLE,
    ("paged_decode", True): PAGED_DECODE,
    ("paged_combine", False): PAGED_COMBINE,
}
"""The same for kernels of keys and values in pages, which a package has if it is asked for; routed layers have none."""

ROUTED_INTERFACES = {
    ("prefill", False): ROUTED_PREFILL,
    ("prefill", True): ROUTED_PREFILL_BY_TABLE,
    ("decode", True): ROUTED_DECODE,
    ("combine", False): COMBINE,
    ("write_nodes", False): WRITE_NODES,
    ("choose", True): CHOOSE,
    ("attend_chosen", False): ATTEND_CHOSEN,
}
"""The same for kernels of layers with routed heads."""

PHASES = tuple(dict.fromkeys(phase for phase, _ in INTERFACES))
"""One phase for any number of queries, and two that together handle a single query."""

ROUTER_PHASES = tuple(dict.fromkeys(phase for phase, _ in ROUTED_INTERFACES if phase not in PHASES))
"""The phases that come first in layers with routed heads, in their order."""

SHARED_PHASES = ("combine",)
"""The phases whose kernels serve layers with and without routed heads alike."""

PAGED = "paged_"
"""The beginning of the names of kernels for keys and values in pages, and of their phases."""

PREFILL_PHASES = ("prefill", "paged_prefill")
"""The phases whose kernels are for one schedule each, where they hold it as code."""


def interfaces_of(routed: bool) -> Mapping[tuple[str, bool], Interface]:
    """The interfaces of layers with or without routed heads, by phase and by whether a segment table is read."""
    return ROUTED_INTERFACES if routed else {**INTERFACES, **PAGED_INTERFACES}


def check_interface(entry: KernelEntry, where: str, routed: Collection[int] = ()) -> None:
    """Refuses a kernel of a package that is not built to the interface of its phase; `routed` are the routed layers.

    Raises:
        PackageError: its phase, table, arguments, preconditions or grid differ; the message names `where` and the
            field.
    """
    is_routed = not set(routed).isdisjoint(entry.layers)
    if is_routed and entry.phase not in SHARED_PHASES and not set(routed).issuperset(entry.layers):
        raise _fault(f"{where}.layers", "all with routed heads, or none", short_repr(entry.layers))
    interfaces = interfaces_of(is_routed)
    by_table = {table: interface for (phase, table), interface in interfaces.items() if phase == entry.phase}
    if not by_table:
        phases = dict.fromkeys(phase for phase, _ in interfaces)
        raise _fault(f"{where}.phase", f"one of {', '.join(phases)}", short_repr(entry.phase))
    interface = by_table.get(bool(entry.table))
    if interface is None:
        expected = "no table" if entry.table else "a table"
        raise _fault(f"{where}.table", f"{expected} for the phase {entry.phase}", short_repr(entry.table))
    if entry.phase == "prefill" and entry.launch is not None and entry.launch.persistent:
        interface = interface.persistent
    arguments = (
        tuple(f"{argument.name} {argument.type}" for argument in listed)
        for listed in (interface.binary_arguments, entry.arguments)
    )
    grid = () if entry.launch is None else entry.launch.grid
    _check_equal(f"{where}.arguments", *arguments)
    _check_equal(f"{where}.preconditions", interface.preconditions, entry.preconditions)
    _check_equal(f"{where}.launch.grid", interface.grid, grid)


def _check_equal(where: str, expected: tuple[str, ...], got: tuple[str, ...]) -> None:
    for index, (one, other) in enumerate(zip_longest(expected, got)):
        if one != other:
            raise _fault(f"{where}[{index}]", one or "no more", "none" if other is None else short_repr(other))


def _fault(where: str, expected: str, got: str) -> PackageError:
    return PackageError(where, expected, got, "compile the package with this version of surgeon")
