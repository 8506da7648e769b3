"""The targets of kernels: a processor and the dtypes that it takes."""

import re
from dataclasses import dataclass

from surgeon.runtime.errors import TargetError, short_repr

DTYPES = ("fp32", "bf16", "fp16")
"""Storage types of q, k, v and the output, in the order of their codes in the CPU kernels' ABI."""

_GPU_DTYPES = ("bf16", "fp16")
_SPELLING = re.compile(r"cpu|cuda:(?P<cuda>\d{2,3})|hip:(?P<hip>gfx[0-9a-f]{3,4})")


@dataclass(frozen=True, order=True)
class Target:
    """A processor that kernels are compiled for: `cpu`, `cuda:90`, `hip:gfx942`."""

    backend: str
    arch: str = ""

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parses a target as it is written on the command line.

        Raises:
            TargetError: the text does not name a target.
        """
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise TargetError(
                f"target {short_repr(text)}",
                "cpu, cuda:<compute capability> or hip:<gfx name>",
                short_repr(text),
                "write, for example, --target cpu or --target cuda:90",
            )
        backend = text.partition(":")[0]
        return cls(backend, match["cuda"] or match["hip"] or "")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The storage types that kernels for this target take."""
        return DTYPES if self.backend == "cpu" else _GPU_DTYPES

    @property
    def folder(self) -> str:
        """The target's own folder in a package."""
        return str(self).replace(":", "-")

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}" if self.arch else self.backend
