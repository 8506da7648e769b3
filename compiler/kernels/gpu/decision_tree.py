"""Decision trees: balanced searches over a kernel's integers, because kernels cannot hold constant arrays."""

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
    """A branch: continues with `below` if `variable` < `bound`, else with `above`."""

    variable: str
    bound: int
    below: "Tree[Value]"
    above: "Tree[Value]"


Tree = Leaf[Value] | Split[Value]


def search(variable: str, cases: Sequence[tuple[int, Tree[Value]]]) -> Tree[Value]:
    """Builds a balanced search for the last case whose number is at most `variable`; below all of them, the first."""
    distinct = [
        case for before, case in zip([None, *cases], cases, strict=False) if before is None or before[1] != case[1]
    ]
    return _balanced(variable, distinct)


def _balanced(variable: str, cases: Sequence[tuple[int, Tree[Value]]]) -> Tree[Value]:
    if len(cases) == 1:
        return cases[0][1]
    middle = len(cases) // 2
    return Split(variable, cases[middle][0], _balanced(variable, cases[:middle]), _balanced(variable, cases[middle:]))
