"""Fields of a parsed JSON document that are checked one by one; a fault says where it is.

Source: topology.json (`topology.schema.json` beside this file).
"""

from collections.abc import Mapping
from typing import Any

from surgeon.runtime.errors import TopologyError, short_repr


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """The value, if it is an object; raises a TopologyError otherwise."""
    if not isinstance(value, dict):
        raise TopologyError(where, "an object", short_repr(value), "write it in braces")
    return value


def object_of(
    value: object, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """The value, if it is an object with the required keys, perhaps some optional ones, and no others.

    Raises:
        TopologyError: it is not; the text names the key.
    """
    fields = mapping(value, where)
    for key in required:
        if key not in fields:
            raise TopologyError(where, f"the key {key!r}", "an object without it", "add it")
    for key in fields:
        if key not in required and key not in optional:
            known = ", ".join((*required, *optional))
            raise TopologyError(
                where, f"the keys {known}", f"an unknown key {short_repr(key)}", "remove it or correct its spelling"
            )
    return fields


def list_of(value: object, where: str, low: int, high: int) -> list[Any]:
    """The value, if it is a list of `low` to `high` entries; raises a TopologyError otherwise."""
    if not isinstance(value, list):
        raise TopologyError(where, "a list", short_repr(value), "write it in brackets")
    if not low <= len(value) <= high:
        raise TopologyError(where, f"{low} to {high} entries", str(len(value)), "correct the list")
    return value


def integer(value: object, where: str, low: int, high: int) -> int:
    """The value, if it is a whole number from `low` to `high`; raises a TopologyError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TopologyError(where, "a whole number", short_repr(value), "write it without quotes, point or exponent")
    if not low <= value <= high:
        raise TopologyError(where, f"a number in {low}..{high}", short_repr(value), "correct it")
    return value


def choice(value: object, where: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices; raises a TopologyError otherwise."""
    if value not in choices or not isinstance(value, str):
        raise TopologyError(where, "one of " + ", ".join(choices), short_repr(value), "choose one of these")
    return value


def constant(value: object, where: str, constant: object) -> None:
    """Refuses a value that is not the constant, in value and type, with a TopologyError."""
    if value != constant or type(value) is not type(constant):
        raise TopologyError(where, repr(constant), short_repr(value), "this version reads nothing else")
