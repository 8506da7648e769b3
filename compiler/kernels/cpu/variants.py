"""The variants of a CPU library: instruction sets, each with a register tile to fit."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """One instruction set and the register tile that fits it.

    `flags` go to the compiler; `features` are those that the processor must have, as `__builtin_cpu_supports` spells
    them; `lanes` is floats per vector, `panel_vectors` vectors of queries per panel, `tile_keys` and `tile_dims` the
    other side of the two matrix products' register tiles. For up to `decode_queries` queries per sequence, lanes of
    dimensions are faster than half-empty panels of queries.
    """

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    panel_vectors: int
    tile_keys: int
    tile_dims: int
    decode_queries: int
    rest: None = None


@dataclass(frozen=True)
class TileVariant:
    """A matrix unit for prefill in bf16, beside the variant `rest`, whose kernels run every other call.

    `flags` go to the compiler; `unit` is the template of the unit's operations.
    """

    name: str
    flags: tuple[str, ...]
    rest: Variant
    unit: str

    @property
    def features(self) -> tuple[str, ...]:
        """The features that the processor must have besides the unit."""
        return self.rest.features


PORTABLE = Variant("portable", (), (), lanes=4, panel_vectors=2, tile_keys=6, tile_dims=6, decode_queries=2)
X86_64_V4 = Variant(
    "x86_64_v4",
    ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi", "bmi2"),
    lanes=16,
    panel_vectors=2,
    tile_keys=8,
    tile_dims=8,
    decode_queries=16,
)
X86_64: tuple[Variant | TileVariant, ...] = (
    TileVariant("x86_64_amx", (*X86_64_V4.flags, "-mamx-tile", "-mamx-bf16"), X86_64_V4, "amx"),
    X86_64_V4,
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
    replace(PORTABLE, flags=("-march=x86-64",)),  # some compilers' default is newer
)
"""The variants of an x86-64 library, fastest first."""


def variants_for(machine: str) -> tuple[Variant | TileVariant, ...]:
    """Returns the variants to build on a machine, given as `platform.machine()` names it."""
    return X86_64 if machine in ("x86_64", "AMD64") else (PORTABLE,)
