"""A strict reader of JSON: every key exactly once, none missing or unknown, every value of its exact type."""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from surgeon.runtime.errors import SurgeonError, reason_of, remedy_for, short_repr
from surgeon.runtime.package.files import read_any

Document = TypeVar("Document")


@dataclass(frozen=True)
class Fault:
    """The errors of one kind of file; `remedy`, for files that a program writes, replaces the remedy of each place."""

    error: type[SurgeonError]
    remedy: str | None = None

    def __call__(self, where: str, expected: str, got: str, remedy: str = "correct it") -> SurgeonError:
        """Makes the error for a place."""
        return self.error(where, expected, got, self.remedy or remedy)


def read_document(
    path: str | os.PathLike[str],
    limit: int,
    parse: Callable[[str], Document],
    fault: Fault,
    smaller: str = "shorten it",
) -> Document:
    """Reads a file of at most `limit` bytes and parses its text; `smaller` is the remedy if it has more.

    Raises:
        SurgeonError: made by `fault` if the file cannot be read, is too large or is not UTF-8 text; raised by `parse`,
            with the file put before the place.
    """
    file = Path(path)
    try:
        data = read_any(file, limit)
        if len(data) > limit:
            raise fault(str(file), f"at most {limit} bytes", "a larger file", smaller)
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(str(file), "UTF-8 text", f"a stray byte at {error.start}", "save it as UTF-8") from None
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a path with a null character
        remedy = remedy_for(error, "check the path")
        raise fault.error(str(file), "a readable file", reason_of(error), remedy) from None
    try:
        return parse(text)
    except fault.error as error:
        raise fault.error(f"{file}: {error.where}", error.expected, error.got, error.remedy) from None
    except MemoryError as error:
        raise fault.error(str(file), "a file that fits in memory", "a larger one", remedy_for(error, "")) from None


def parse_json(text: str, where: str, fault: Fault) -> object:
    """Parses JSON; NaN and infinities are left for the reader of each value to refuse, which knows its place.

    Raises:
        SurgeonError: made by `fault` if the text is not JSON, repeats a key, or has too many levels or digits.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise fault(where, "every key once", f"{short_repr(key)} twice", "remove one of them")
            result[key] = value
        return result

    try:
        return typing.cast(object, json.loads(text, object_pairs_hook=unique))
    except json.JSONDecodeError as error:
        place = f"{where}: line {error.lineno} column {error.colno}"
        raise fault(place, "JSON", error.msg, "correct the syntax") from None
    except RecursionError:
        raise fault(where, "JSON of a few levels", "nesting too deep to read", "correct the file") from None
    except ValueError:  # Python's limit on digits
        raise fault(where, "numbers of a few digits", "one of thousands", "correct the file") from None


def parse_root(
    text: str, kind: str, versions: Sequence[int], where: str, fault: Fault
) -> tuple[int, dict[str, object]]:
    """Parses a JSON object that states its format and version; returns the version and the other keys.

    Raises:
        SurgeonError: made by `fault` as in `parse_json`, or if the text is not an object with this format and one of
            the versions.
    """
    root = parse_json(text, where, fault)
    if not isinstance(root, dict):
        raise fault(where, "an object", short_repr(root))
    found = root.pop("format", None)
    if found != kind:
        raise fault(f"{where}: format", repr(kind), short_repr(found))
    version = root.pop("version", None)
    if type(version) is not int or version not in versions:
        raise fault(f"{where}: version", " or ".join(map(str, versions)), f"{short_repr(version)}{_maker(root)}")
    return version, root


def _maker(root: Mapping[str, object]) -> str:
    """Names the version of surgeon that made a file, as pilots and manifests say it; nothing if this one does not."""
    tools = root.get("tools")
    said = [tool.get("version") for tool in tools if tool.get("name") == "surgeon"] if _are_objects(tools) else []
    named = root.get("surgeon", said[0] if said else None)
    return f", as surgeon {short_repr(named)} writes it" if isinstance(named, str) else ""


def _are_objects(value: object) -> TypeGuard[list[dict[str, object]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_plain(kind: Any, value: object, where: str, fault: Fault) -> object:
    """Turns parsed JSON into `kind`: a dataclass, or the type of a field of one.

    A field's type is a dataclass, a plain type, `tuple[X, ...]` or `X | None`.

    Raises:
        SurgeonError: made by `fault` if a key is missing or unknown, a value has another type or is not finite, or an
            integer has more than 64 bits.
    """
    origin = typing.get_origin(kind)
    if origin is types.UnionType:  # X | None
        inner, _ = typing.get_args(kind)
        return None if value is None else read_plain(inner, value, where, fault)
    if origin is tuple:  # tuple[X, ...]
        if not isinstance(value, list):
            raise fault(where, "a list", short_repr(value))
        inner = typing.get_args(kind)[0]
        return tuple(read_plain(inner, item, f"{where}[{i}]", fault) for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise fault(where, "an object", short_repr(value))
        names = {field.name: field.type for field in dataclasses.fields(kind)}
        if set(names) != set(value):
            raise fault(where, "the keys " + ", ".join(names), short_repr(sorted(value)))
        return typing.cast(Any, kind)(
            **{name: read_plain(typ, value[name], f"{where}: {name}", fault) for name, typ in names.items()}
        )
    if type(value) is not kind:
        raise fault(where, f"a value of type {kind.__name__}", short_repr(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise fault(where, "a finite number", short_repr(value))
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise fault(where, "an integer of 64 bits", short_repr(value))
    return value
