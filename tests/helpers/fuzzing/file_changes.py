"""Changes to a package's topology, schedules and tables, whose sizes and hashes the manifest then has."""

import contextlib
import copy
import functools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from fuzzing import json_mutations
from fuzzing.manifest_changes import Json

Arrays = dict[str, npt.NDArray[Any]]


def changed_topology(topology: bytes, manifest: Json, rng: random.Random) -> bytes:
    """Another topology; in half of the cases the manifest says of it what it said of the original."""
    document: Json = json.loads(topology)
    for _ in range(rng.choice((1, 1, 2))):
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # it is broken
            if rng.random() < 0.5:
                json_mutations.mutate(document, rng)
            else:
                fields = rng.choice((document, document["model"], *_heads_of(document), *_heads_of(document)))
                json_mutations.mutate(fields, rng)
    if rng.random() < 0.5:
        manifest |= {name: document[name] for name in ("block_size", "num_blocks", "beyond") if name in document}
        manifest["model"] = copy.deepcopy(document.get("model"))
        with contextlib.suppress(TypeError, KeyError):
            manifest["layers"] = [at for at, layer in enumerate(document["layers"]) if layer]
    text = json_mutations.encode(document)
    if rng.random() < 0.7 and not json_mutations.is_special(document):
        with contextlib.suppress(TypeError):  # keys of several types have no order
            text = json.dumps(document, sort_keys=True, separators=(",", ":"))  # as the compiler writes it
    data = text.encode("utf-8", "surrogatepass") + rng.choice((b"\n", b"\n", b"", b"\n\n"))
    return json_mutations.damage(data, rng) if rng.random() < 0.1 else data


def _heads_of(document: Json) -> list[Any]:
    return [layer["heads"] for layer in document["layers"] if layer]


def changed_tensors(data: bytes, rng: random.Random) -> bytes:
    way = rng.random()
    if way < 0.1:
        return json_mutations.damage(data, rng)
    if way < 0.2:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for _ in range(rng.choice((1, 1, 2))):
            with contextlib.suppress(
                ArithmeticError, AttributeError, LookupError, TypeError, ValueError
            ):  # it is broken
                json_mutations.mutate(rng.choice((header, rng.choice(list(header.values())))), rng)
        text = json_mutations.encode(header).encode("utf-8", "surrogatepass")
        length = rng.choice((len(text),) * 8 + (0, 2**63, 2**64 - 1, len(text) - 1, len(text) + 1, len(data)))
        return struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]
    arrays = {name: array.copy() for name, array in arrays_of(data).items()}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(arrays))
        changed = rng.choice(ARRAYS)(arrays, name, rng)
        if changed is None:
            arrays.pop(name)
        else:
            arrays[name] = np.ascontiguousarray(changed)
    return safetensors.numpy.save(arrays)


@functools.cache
def arrays_of(data: bytes) -> Arrays:
    found: Arrays = safetensors.numpy.load(data)
    return found


_NUMBERS = (-(2**31), -(10**6), -2, -1, 0, 1, 2, 3, 4, 5, 8, 64, 1000, 2**20, 2**30, 2**31 - 2, 2**31 - 1)
Change = Callable[[Arrays, str, random.Random], "npt.NDArray[Any] | None"]


def _one_number(arrays: Arrays, name: str, rng: random.Random) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.size:
        flat = array.reshape(-1)
        at = rng.randrange(array.size)
        now = int(flat[at])
        new = rng.choice((*_NUMBERS, now + 1, now - 1, now + 1, now - 1, -now, int(flat[rng.randrange(array.size)])))
        flat[at] = (new + 2**31) % 2**32 - 2**31 if array.dtype == np.int32 else 0
    return array


def _rows(arrays: Arrays, name: str, rng: random.Random) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.ndim != 2 or not len(array):
        return array
    one, other = rng.randrange(len(array)), rng.randrange(len(array))
    changes: tuple[Callable[[], npt.NDArray[Any]], ...] = (
        lambda: np.delete(array, one, axis=0),
        lambda: np.insert(array, one, array[other], axis=0),
        lambda: array[[other if at == one else one if at == other else at for at in range(len(array))]],
        lambda: array[::-1],
        lambda: array[:0],
        lambda: array[:, :-1],
        lambda: np.concatenate((array, array[:, :1]), axis=1),
        lambda: array[:, ::-1],
    )
    return rng.choice(changes)()


def _form(arrays: Arrays, name: str, rng: random.Random) -> npt.NDArray[Any]:
    array = arrays[name]
    changes: tuple[Callable[[], npt.NDArray[Any]], ...] = (
        *(lambda kind=kind: array.astype(kind) for kind in (np.int64, np.int16, np.uint32, np.float32, np.bool_)),
        lambda: array.reshape(-1),
        lambda: array.reshape(1, *array.shape),
        lambda: array.T,
        lambda: array.view(np.uint8) if array.size and array.flags.c_contiguous else array,
    )
    return rng.choice(changes)()


def _of_another(arrays: Arrays, name: str, rng: random.Random) -> npt.NDArray[Any]:
    return arrays[rng.choice(sorted(arrays))].copy()


def _gone(arrays: Arrays, name: str, rng: random.Random) -> "npt.NDArray[Any] | None":
    if rng.random() < 0.5:
        arrays[rng.choice((name + "x", "", name.upper(), "é" + name))] = arrays[name].copy()
        return arrays[name]
    return None


ARRAYS: tuple[Change, ...] = (*[_one_number] * 10, *[_rows] * 4, _form, _of_another, _gone)
