"""Changes to JSON documents and to their text that know the structure: the common part of all cases of the fuzzer.

A document may hold `Raw` texts, which are written as they stand, and `Twice` keys, which repeat a key of their object.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple


class Raw(str):
    """Text that stands for itself in the JSON, such as 1e999."""


class Twice(str):
    """A key that is written like another key of the same object."""


class Place(NamedTuple):
    """A value in a document: its container and its key or index there."""

    container: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.container[self.key]


TOKENS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "-0.0", "01", "+1", "1.", ".5", "0x10", "1_0"),
    *("1E2", "1e2", "1.0", "0.0", "2.0", "9007199254740993", "9007199254740993.0", "1e308", "1.8e308", "nan", "true"),
    *("True", "null", "None", "undefined", "'1'", "[,]", "{,}", "[1,]", '{"a":1,}', "\\u0031", '"\\ud800"', '"\\x41"'),
    *('"\\u0000"', '"\t"', '"\\ud83d\\ude00"', '"\\ude00\\ud83d"', "", " ", "/**/1", "1 2", "1" * 4300, "1" * 4301),
    *("[" * 30 + "]" * 30, "[" * 70 + "]" * 70, "[" * 950 + "]" * 950, "[" * 3000, "[" * 3000 + "]" * 3000),
    *('{"a":' * 60 + "1" + "}" * 60, '{"a":' * 2000 + "1" + "}" * 2000),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, -2, 15, 16, 17, 32, 64, 511, 512, 513, 1023, 1024, 1025, 16384, 16385, 262144),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 1.5, -1.0, 1e308, 1e-320, 5e-324, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**53 + 1),
    *(2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**310, -(10**310), "", "0", "1", "1.0", "true", "null", "x" * 300),
    *("\ud800", "\u202e", "é", "a\nb", "\0", "dense", "window", "error", "llama", "llama\n", "surgeon.topology"),
    *([], {}, [[]], [{}], [None], [0, 1], {"a": 1}, {"": None}, {"dense": True}, [0, 1, 1.0, 2]),
)
WRAPPERS: tuple[Callable[[Any], Any], ...] = (
    lambda value: [value],
    lambda value: {"value": value},
    lambda value: [value, value],
    str,
    lambda value: [value[0]] if isinstance(value, list) and value else value,
    lambda value: dict(enumerate(map(str, value))) if isinstance(value, list) else value,
    lambda value: list(value.values()) if isinstance(value, dict) else value,
    lambda value: list(value.items()) if isinstance(value, dict) else value,
    lambda value: float(value) if isinstance(value, int) and abs(value) < 2**53 else value,
    lambda value: bool(value) if isinstance(value, int) else value,
)
_RAW, _TWICE = "\x02", "\x03"


def encode(document: Any) -> str:
    """The document as JSON, with its raw texts and repeated keys."""
    raws: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"{_RAW}{len(raws) - 1}{_RAW}"
        if isinstance(value, dict):
            return {f"{key}{_TWICE}" if isinstance(key, Twice) else key: plain(item) for key, item in value.items()}
        return list(map(plain, value)) if isinstance(value, list | tuple) else value

    text = json.dumps(plain(document) if is_special(document) else document)
    for index, raw in enumerate(raws):
        text = text.replace(f'"\\u0002{index}\\u0002"', raw)
    return text.replace("\\u0003", "")


def is_special(value: Any) -> bool:
    """True if a document holds raw texts or repeated keys."""
    if isinstance(value, dict):
        return any(isinstance(key, Twice) or is_special(item) for key, item in value.items())
    return isinstance(value, Raw) or (isinstance(value, list) and any(map(is_special, value)))


def place(document: Any, rng: random.Random) -> Place:
    """A random place in a container that is not empty, found by walking down, so that every level is met often."""
    container = document
    while True:
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
        value = container[key]
        if not isinstance(value, list | dict) or not value or rng.random() < 0.2:
            return Place(container, key)
        container = value


def mutate(document: Any, rng: random.Random) -> None:
    """Changes one thing in the document, which is an object or a list, in place."""
    if document:
        rng.choice(MUTATIONS)(document, place(document, rng), rng)


def _set(document: Any, here: Place, rng: random.Random) -> None:
    here.container[here.key] = copy.deepcopy(rng.choice(VALUES))


def _set_token(document: Any, here: Place, rng: random.Random) -> None:
    here.container[here.key] = Raw(rng.choice(TOKENS))


def _nudge(document: Any, here: Place, rng: random.Random) -> None:
    for _ in range(8):  # numbers are what is nudged; another place may hold one
        if isinstance(here.value, int | float) and not isinstance(here.value, bool):
            change = rng.choice((1, -1, 1, -1, 2, -2, *((0.5, 1e-9) if abs(here.value) < 2**53 else ())))
            here.container[here.key] = -here.value if rng.random() < 0.1 else here.value + change
            return
        here = place(document, rng)


def _remove(document: Any, here: Place, rng: random.Random) -> None:
    del here.container[here.key]


def _repeat(document: Any, here: Place, rng: random.Random) -> None:
    if isinstance(here.container, list):
        here.container.insert(here.key, copy.deepcopy(here.value))
    else:
        value = here.value if rng.random() < 0.5 else rng.choice(VALUES)
        here.container[Twice(here.key)] = copy.deepcopy(value)


def _exchange(document: Any, here: Place, rng: random.Random) -> None:
    keys = list(here.container) if isinstance(here.container, dict) else range(len(here.container))
    other = rng.choice(keys)
    here.container[here.key], here.container[other] = here.container[other], here.value


def _transplant(document: Any, here: Place, rng: random.Random) -> None:
    other = place(document, rng)
    if other.container is not here.container or other.key != here.key:
        here.container[here.key] = copy.deepcopy(other.value)


def _retype(document: Any, here: Place, rng: random.Random) -> None:
    here.container[here.key] = rng.choice(WRAPPERS)(here.value)


def _rename(document: Any, here: Place, rng: random.Random) -> None:
    if isinstance(here.container, dict):
        key = str(here.key)
        names = (key.upper(), key + " ", key[:-1], key + "s", "", key.replace("e", "е"), "__class__", "\ud800", key * 9)
        here.container[rng.choice(names)] = here.container.pop(here.key)


def _add(document: Any, here: Place, rng: random.Random) -> None:
    value = copy.deepcopy(rng.choice(VALUES))
    if isinstance(here.container, dict):
        here.container[rng.choice(("dense", "route", "router", "paths", "linkage", "arity", "x", "", "cut"))] = value
    else:
        here.container.insert(rng.choice((here.key, len(here.container))), value)


def _truncate(document: Any, here: Place, rng: random.Random) -> None:
    if isinstance(here.value, list):
        del here.value[rng.randrange(len(here.value) + 1) :]
    elif isinstance(here.value, str):
        here.container[here.key] = here.value[: rng.randrange(len(here.value) + 1)]


def _replace_everywhere(document: Any, here: Place, rng: random.Random) -> None:
    """Replaces a value wherever it stands, as an editor's search and replace would."""
    old = here.value
    if isinstance(old, list | dict):
        return
    new = rng.choice((rng.choice(VALUES), place(document, rng).value))
    if isinstance(new, list | dict):
        return

    def walk(value: Any) -> None:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, item in items:
            if isinstance(item, list | dict):
                walk(item)
            elif type(item) is type(old) and item == old:
                value[key] = new

    walk(document)


MUTATIONS: tuple[Callable[[Any, Place, random.Random], None], ...] = (
    *(_set, _set, _set_token, _set_token, _nudge, _nudge, _nudge, _remove, _repeat, _exchange, _exchange, _transplant),
    *(_retype, _rename, _add, _truncate, _replace_everywhere),
)


# The text


def damage(data: bytes, rng: random.Random) -> bytes:
    """Changes the bytes of a text."""
    return rng.choice(_DAMAGES)(data, rng)


def _one_byte(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    new = rng.choice((bytes([rng.randrange(256)]), b"", b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"\\"))
    return data[:at] + new + data[at + rng.choice((0, 1, 1, 1)) :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:begin], data[begin:], data[:begin] + data[end:], data[:end] + data[begin:]))


def _encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(
        rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7", "cp500")), "replace"
    )


def _around(data: bytes, rng: random.Random) -> bytes:
    extra = rng.choice(
        [
            *(
                b" ",
                b"\n",
                b"\r\n\t",
                b"\0",
                b"\x0b",
                b"\xc2\xa0",
                b"\xef\xbb\xbf",
                b"{}",
                b"x",
                b"//",
                b",",
                b";",
                b"\xff",
            ),
            *(b"\xed\xa0\x80", b"\xc0\x80", b"\x1a", b"null", b"]", b"}", data[:200]),
        ]
    )
    return rng.choice((extra + data, data + extra))


def _inside(data: bytes, rng: random.Random) -> bytes:
    """Puts something between two tokens or into a string."""
    spots = [at for at in range(len(data)) if data[at] in b'{}[],:"']
    at = rng.choice(spots) if spots else 0
    new = (
        b" ",
        b"\n",
        b"\t",
        b"\r",
        b"\x0c",
        b"/**/",
        b"#",
        b",",
        b"\\u0000",
        b"\\",
        b"\xed\xa0\x80",
        b"\xc3\xa9",
        b"\0",
    )
    return data[: at + 1] + rng.choice(new) + data[at + 1 :]


def _escape(data: bytes, rng: random.Random) -> bytes:
    """Writes a letter as its escape: the same text where it is in a string."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + b"".join(b"\\u%04x" % byte for byte in data[at : at + 1]) + data[at + 1 :]


_DAMAGES = (_one_byte, _one_byte, _one_byte, _cut, _encoding, _around, _around, _inside, _inside, _escape)
