"""The versions of the tools that make compiled parts."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from surgeon.runtime.installation import version as own_version


@dataclass(frozen=True)
class Range:
    """The minor versions of a tool that are tested, from the first to the last."""

    first: tuple[int, int]
    last: tuple[int, int]

    def __contains__(self, found: str) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", found)
        return numbers is not None and self.first <= (int(numbers[1]), int(numbers[2])) <= self.last

    def __str__(self) -> str:
        return " to ".join(f"{major}.{minor}" for major, minor in (self.first, self.last))

    @property
    def requirement(self) -> str:
        """The range as pip writes it."""
        (major, minor), (last_major, last_minor) = self.first, self.last
        return f">={major}.{minor},<{last_major}.{last_minor + 1}"


TRITON = Range((3, 6), (3, 9))
"""The versions of Triton under which all templates were interpreted and compiled, with equal binary interfaces."""


def versions(*distributions: str) -> tuple[str, ...]:
    """The versions of these distributions, "none" for one that is not installed, then Surgeon's own."""
    return (*map(_version, distributions), own_version())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
