"""The free part of a topology file, which programs write again and show: as JSON, in UTF-8, and recursively."""

import math
from collections.abc import Mapping
from typing import Any

from surgeon.runtime.errors import TopologyError, short_repr

MAX_LEVELS = 64
"""The most lists and objects inside one another."""


def check_provenance(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses a provenance that could be read, but not be written as JSON or shown.

    Raises:
        TopologyError: it holds a number that is not finite or half of a surrogate pair, or has too many levels.
    """
    level: list[tuple[str, object]] = [("provenance", provenance)]
    for _ in range(MAX_LEVELS):
        level = [entry for where, value in level for entry in _entries(value, where)]
        for where, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise TopologyError(where, "a finite number", repr(value), "write it as text, or leave it out")
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise TopologyError(where, "whole letters", short_repr(value), "remove the half of a surrogate pair")
    if any(isinstance(value, list | dict) for _, value in level):
        raise TopologyError("provenance", f"at most {MAX_LEVELS} levels", "more", "make it flatter")
    return provenance


def _entries(value: object, where: str) -> list[tuple[str, object]]:
    """The entries of a list or an object, keys too, each with its place."""
    if isinstance(value, list):
        return [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, dict):
        keys = [(f"a key of {where}", key) for key in value]
        return keys + [(f"{where}.{short_repr(key)}", item) for key, item in value.items()]
    return []
