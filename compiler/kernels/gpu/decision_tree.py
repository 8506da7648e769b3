"""Decision trees, balanced searches over integers that a kernel knows, where kernels hold no constant arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Leaf(Generic[Value]):
    """A decision."""

    value: Value


@dataclass(frozen=True)
class Split(Generic[Value]):
    """Go on with `below` where `variable` < `bound`, else with `above`."""

    variable: str
    bound: int
    below: "Tree[Value]"
    above: "Tree[Value]"


Tree = Leaf[Value] | Split[Value]


def search(variable: str, cases: Sequence[tuple[int, Tree[Value]]]) -> Tree[Value]:
    """A balanced search for the last case whose number is at most `variable`; the first also holds below its own."""
    distinct = [
        case for before, case in zip([None, *cases], cases, strict=False) if before is None or before[1] != case[1]
    ]
    return _balanced(variable, distinct)


def _balanced(variable: str, cases: Sequence[tuple[int, Tree[Value]]]) -> Tree[Value]:
    if len(cases) == 1:
        return cases[0][1]
    middle = len(cases) // 2
    return Split(variable, cases[middle][0], _balanced(variable, cases[:middle]), _balanced(variable, cases[middle:]))
