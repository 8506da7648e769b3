"""Parsed JSON into frozen dataclasses, strictly: every key there, none unknown, every value of its exact type."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from surgeon.runtime.errors import SurgeonError, shown

Fault = Callable[[str, str, str], SurgeonError]
"""Makes the error of a place from where it is, what was expected there, and what was found."""


def read_plain(kind: Any, value: object, where: str, fault: Fault) -> object:
    """Turns parsed JSON into `kind`: a dataclass, or the type of a field of one.

    A field's type is a dataclass, a plain type, `tuple[X, ...]` or `X | None`.

    Raises:
        SurgeonError: what `fault` makes, where a key is missing or unknown, or a value has another type.
    """
    origin = typing.get_origin(kind)
    if origin is types.UnionType:  # X | None
        inner, _ = typing.get_args(kind)
        return None if value is None else read_plain(inner, value, where, fault)
    if origin is tuple:  # tuple[X, ...]
        if not isinstance(value, list):
            raise fault(where, "a list", shown(value))
        inner = typing.get_args(kind)[0]
        return tuple(read_plain(inner, item, f"{where}[{i}]", fault) for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise fault(where, "an object", shown(value))
        names = {field.name: field.type for field in dataclasses.fields(kind)}
        if set(names) != set(value):
            raise fault(where, "the keys " + ", ".join(names), shown(sorted(value)))
        return typing.cast(Any, kind)(
            **{name: read_plain(typ, value[name], f"{where}: {name}", fault) for name, typ in names.items()}
        )
    if type(value) is not kind:
        raise fault(where, f"a value of type {kind.__name__}", shown(value))
    return value
