"""From kernel specifications to the C++ of one CPU library: kernels for each instruction set, driver, schedule."""

from dataclasses import dataclass

from surgeon.compiler.specs.artifacts import KernelSpec, Source, SourceFile
from surgeon.compiler.system.jinja import render_template
from surgeon.runtime.package.manifest import CPU_ABI_VERSION
from surgeon.runtime.package.schedule import HeadSchedule
from surgeon.runtime.package.target import DTYPES

_TYPES = dict(zip(DTYPES, ("float", "BFloat16", "Half"), strict=True))
_CHUNK = 128  # keys
_DECODE_CHUNK_ELEMENTS = 4096  # of keys, and as many of values: what the L1 cache holds as floats
_SPLIT_KEYS = 256
_SPLITS_PER_THREAD = 4
# What a thread must have to do before it is worth waking: that takes some tens of microseconds.
_OPERATIONS_PER_THREAD = 20e6
_BYTES_PER_THREAD = 0.5e6


@dataclass(frozen=True)
class Variant:
    """One instruction set and the register tile that fits it.

    `flags` go to the compiler; `features` are what the processor must have, as `__builtin_cpu_supports` spells it;
    `lanes` is floats a vector, `panel_vectors` vectors of queries a panel, `tile_keys` and `tile_dims` the other side
    of the two matrix products' register tiles. Up to `decode_queries` queries a sequence, lanes of dimensions beat
    half-empty panels of queries.
    """

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    panel_vectors: int
    tile_keys: int
    tile_dims: int
    decode_queries: int


PORTABLE = Variant("portable", (), (), lanes=4, panel_vectors=2, tile_keys=6, tile_dims=6, decode_queries=2)
X86_64 = (
    Variant(
        "x86_64_v4",
        ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi", "bmi2"),
        lanes=16,
        panel_vectors=2,
        tile_keys=8,
        tile_dims=8,
        decode_queries=16,
    ),
    Variant(
        "x86_64_v3",
        ("-march=x86-64-v3",),
        ("avx2", "fma", "f16c", "bmi", "bmi2"),
        lanes=8,
        panel_vectors=2,
        tile_keys=6,
        tile_dims=6,
        decode_queries=6,
    ),
    PORTABLE,
)
"""The variants of an x86-64 library, fastest first."""


def variants_for(machine: str) -> tuple[Variant, ...]:
    """The variants to build on a machine, as `platform.machine()` names it."""
    return X86_64 if machine in ("x86_64", "AMD64") else (PORTABLE,)


def render_cpu(specs: tuple[KernelSpec, ...], variants: tuple[Variant, ...]) -> Source:
    """The C++ sources of one library that holds all of the specifications' kernels."""
    dtypes = {dtype: _TYPES[dtype] for dtype in specs[0].dtypes}
    files = {
        "call.h": render_template(
            "cpu/call.h.jinja",
            head_dim=specs[0].head_dim,
            block_size=specs[0].schedule.block_size,
            abi_version=CPU_ABI_VERSION,
            dtypes=DTYPES,
        ),
        "visible.h": render_template("cpu/visible.h.jinja", chunk=_CHUNK),
        "vectors.h": render_template("cpu/vectors.h.jinja"),
        "chunk.h": render_template("cpu/chunk.h.jinja"),
        "rotary.h": render_template("cpu/rotary.h.jinja"),
        "prefill.h": render_template("cpu/prefill.h.jinja"),
        "decode.h": render_template("cpu/decode.h.jinja", decode_chunk=_DECODE_CHUNK_ELEMENTS // specs[0].head_dim),
        "driver.cpp": render_template(
            "cpu/driver.cpp.jinja",
            variants=variants,
            split_keys=_SPLIT_KEYS,
            splits_per_thread=_SPLITS_PER_THREAD,
            operations_per_thread=_OPERATIONS_PER_THREAD,
            bytes_per_thread=_BYTES_PER_THREAD,
        ),
        "schedule.cpp": _render_schedule(specs),
    }
    for variant in variants:
        files[f"{variant.name}.cpp"] = render_template("cpu/variant.cpp.jinja", variant=variant, dtypes=dtypes)
    return Source(
        target=specs[0].target,
        specs=specs,
        files=tuple(SourceFile(f"cpu/{name}", text) for name, text in files.items()),
    )


def symbol_of(spec: KernelSpec) -> str:
    """The function in the library that runs a kernel."""
    return f"surgeon_{spec.name}"


def _render_schedule(specs: tuple[KernelSpec, ...]) -> str:
    numbers: dict[HeadSchedule, int] = {}
    for spec in specs:
        for head in spec.schedule.heads:
            numbers.setdefault(head, len(numbers))
    layers = [
        {
            "name": spec.name,
            "heads": [numbers[head] for head in spec.schedule.heads],
            "num_key_value_heads": spec.schedule.num_key_value_heads,
            "group": len(spec.schedule.heads) // spec.schedule.num_key_value_heads,
            "block_size": spec.schedule.block_size,
            "num_rows": spec.schedule.num_rows,
        }
        for spec in specs
    ]
    return render_template("cpu/schedule.cpp.jinja", heads=list(numbers), layers=layers)
