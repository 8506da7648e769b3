"""Pilot files of version 1, turned into what a file of version 2 would say."""

from dataclasses import dataclass
from typing import Any, cast

from surgeon.runtime.package.strict_json import Fault, read_plain

_UNMEASURED = (
    "continuation_ratio",
    "continuation_divergence",
    "continuation_agreement",
    "retrieval",
    "worst_retrieval",
    "worst_task",
)
"""The figures beside the dense model that version 1 did not have."""


@dataclass(frozen=True)
class _Cell:
    length: int
    depth: float
    tried: int
    found: int
    log_probability: float


def upgraded(root: dict[str, object], fault: Fault) -> dict[str, object]:
    """The keys of version 2, without those that state format and version, from those of version 1.

    Then patched models read everything by the pattern, and nothing was measured after a prompt: perplexities are of
    whole sequences. Hidden numbers were single ones, asked for at the prompt's end, and a file counts them by length
    and depth; each count stands for one prompt here, since it is not known which of its numbers were found.

    Raises:
        SurgeonError: made by `fault` where the file is none of version 1.
    """
    columns = root.get("columns")
    if not isinstance(columns, list) or not all(isinstance(column, dict) for column in columns):
        raise fault("pilot: columns", "a list of objects", "another")
    read = [_column(column, index, fault) for index, column in enumerate(columns)]
    first = read[0][1] if read else ()
    questions = [
        {"task": "single number", "length": cell.length, "depth": cell.depth, "asked": "end", "prompt": index}
        for index, cell in enumerate(first)
        for _ in range(cell.tried)
    ]
    return (
        {"surgeon": None}
        | root
        | {"questions": questions, "dropped_tasks": [], "columns": [column for column, _ in read]}
    )


def _column(column: dict[str, object], index: int, fault: Fault) -> tuple[dict[str, object], tuple[_Cell, ...]]:
    where = f"pilot: columns[{index}]"
    old = {"passkeys": column.get("passkeys"), "passkeys_found": column.get("passkeys_found")}
    cells = cast(tuple[_Cell, ...], read_plain(tuple[_Cell, ...], old["passkeys"], f"{where}: passkeys", fault))
    beside = column.get("against_dense")
    new: dict[str, Any] = {key: value for key, value in column.items() if key not in old}
    new["scores"] = [float(number < cell.found) for cell in cells for number in range(cell.tried)]
    new["continuation_perplexity"] = None
    patched = beside is not None
    new |= {"recall": "pattern" if patched else None, "dense_rows": 0 if patched else None}
    if isinstance(beside, dict):
        new["against_dense"] = beside | dict.fromkeys(_UNMEASURED)
    return new, cells
