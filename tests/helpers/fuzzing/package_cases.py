"""Cases of packages: changed manifests, and, with hashes that agree, changed topologies, schedules and tables."""

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

import gpu_calls
import topologies
from fuzzing import gpu_recorder, json_mutations, rules
from fuzzing.cases import Kind, Verdict
from fuzzing.json_mutations import Raw
from fuzzing.package_checker import Behaviour, behaviour, out_of_bounds
from surgeon.compiler import compile_package
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import load
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.loading import Package
from surgeon.runtime.package.manifest import ModelShape

MANIFEST, TOPOLOGY, SCHEDULE, TABLES = "manifest.json", "topology.json", "schedule.safetensors", "tables.safetensors"
Json = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Base:
    """A package to change: its files, its manifest, and what it does."""

    files: dict[str, bytes]
    manifest: Json
    """As it stands in the files; not to be changed."""
    shape: ModelShape
    layers: tuple[int, ...]
    gpus: tuple[str, ...]
    behaviour: Behaviour

    @property
    def parts(self) -> list[str]:
        """The parts that may be changed, the manifest more often than others."""
        others = {"topology": TOPOLOGY, "schedule": SCHEDULE, "tables": TABLES}
        parts = [name for name, file in others.items() if file in self.files]
        return ["manifest"] * (2 * len(parts)) + parts


class Case(NamedTuple):
    """The part of a package that was changed, and the files that differ for it, by their paths."""

    base: Base
    part: str
    files: dict[str, bytes]


class Shared(NamedTuple):
    """A folder for copies of packages, and the packages."""

    folder: Path
    bases: tuple[Base, ...]


def prepare(folder: Path) -> Shared:
    """Compiles the packages: one for CPUs with trees, and where Triton is, one for a CPU and two kinds of GPUs."""
    torch.set_num_threads(1)
    wanted: list[tuple[Topology, list[str], list[str]]] = [(cpu_topology(), ["cpu"], ["fp32"])]
    if importlib.util.find_spec("triton"):
        wanted.append((gpu_calls.topology(), ["cpu", *gpu_calls.TARGETS.values()], ["bf16"]))
    # A fork must not find the pool of threads that a kernel has started.
    return Shared(folder, tuple(_base(folder, *each) for each in wanted))


def cpu_topology() -> Topology:
    """Four layers: one not covered, two alike."""
    head = topologies.head
    trees = [
        {"linkage": [[0, 1, 1.0, 2], [2, 3, 1.0, 2], [4, 5, 2.0, 4]]},
        {"paths": [[0, 1], [1, 0], [0, 0], [1, 0]], "arity": 2},
    ]
    one = [head(0, 1.0, 1, 1), head(1, 1.0, 0, 2), head(0, 0.0, 1, 2), topologies.DENSE]
    other = [head(1, 0.0, 1, 2), head(0, 1.0, 1, 1), head(0, 0.0, 0, 1), head(1, 1.0, 2, 1)]
    return topologies.build([one, [], other, one], trees, num_kv_heads=2, block_size=16, num_blocks=4)


def _base(folder: Path, topology: Topology, targets: list[str], dtypes: list[str]) -> Base:
    out = folder / f"package-{len(targets)}"
    compile_package(topology, out, targets, dtypes)
    manifest = json.loads((out / MANIFEST).read_text())
    # Sources are no part of what is loaded, and reading them takes as long as all the rest.
    kept = [entry for entry in manifest["files"] if not entry["path"].endswith((".h", ".cpp", ".py"))]
    manifest["files"] = kept
    files = {entry["path"]: (out / entry["path"]).read_bytes() for entry in kept}
    files[MANIFEST] = json.dumps(manifest).encode()
    gpus = tuple(target for target in targets if target != "cpu")
    fresh = Base(files, manifest, topology.model, topology.covered, gpus, {})
    shutil.rmtree(out)
    return Base(files, manifest, topology.model, topology.covered, gpus, _alone(folder, fresh))


def _alone(folder: Path, base: Base) -> Behaviour:
    """The behaviour of a package, found out in a process of its own, so that this one starts no threads."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _, does = _done(copied(folder, base), base, gradients=True)
            with os.fdopen(write, "wb") as file:
                file.write(json.dumps(does).encode())
            os._exit(0)
        finally:
            os._exit(70)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    found: Behaviour = json.loads(data)
    return found


def copied(folder: Path, base: Base) -> Path:
    """This process's own copy of a package."""
    own = folder / f"{os.getpid()}-{id(base)}"
    for path, data in base.files.items():
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        (own / path).write_bytes(data)
    return own


_copies: dict[tuple[int, int], Path] = {}


def make(shared: Shared, rng: random.Random) -> Case:
    """Makes a case."""
    base = shared.bases[rng.randrange(len(shared.bases))]
    part = rng.choice(base.parts)
    manifest = json.loads(base.files[MANIFEST])
    changed: dict[str, bytes] = {}
    if part == "topology":
        changed[TOPOLOGY] = _changed_topology(base, manifest, rng)
        manifest["topology_sha256"] = hashlib.sha256(changed[TOPOLOGY].removesuffix(b"\n")).hexdigest()
    elif part in ("schedule", "tables"):
        file = SCHEDULE if part == "schedule" else TABLES
        changed[file] = _changed_tensors(base.files[file], rng)
    for entry in manifest["files"]:
        if (data := changed.get(entry["path"])) is not None:
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if part == "manifest" or rng.random() < 0.05:
        part = "manifest" if part == "manifest" else f"manifest and {part}"
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            with contextlib.suppress(
                ArithmeticError, AttributeError, LookupError, TypeError, ValueError
            ):  # it is broken
                _change_manifest(manifest, rng)
    data = json_mutations.encode(manifest).encode("utf-8", "surrogatepass")
    if part == "manifest" and rng.random() < 0.05:
        data = json_mutations.damage(data, rng)
    return Case(base, part, changed | {MANIFEST: data})


def judge(case: Case, folder: Path) -> Verdict:
    """Loads a case's package, which lies in `folder`, and compares what it does with the original."""
    try:
        refused, does = _done(folder, case.base, gradients=SCHEDULE in case.files)
    except SurgeonError as error:
        cause = error.__cause__  # the reader's last resort keeps what it did not foresee
        if cause is not None and not isinstance(cause, OSError | MemoryError | ValueError):
            raise cause from None
        text = str(error).replace(str(folder), "")
        if not text.isprintable() or len(text) > 1500:
            return Verdict("refused", f"an error that is not one printable line: {text!r:.200}")
        return Verdict("refused", "")
    targets = {name.partition(" ")[0] for name in does}
    right = {name: of for name, of in case.base.behaviour.items() if name in does or not _may_lack(name, case, targets)}
    other = sorted(name for name in {*does, *right} if does.get(name) != right.get(name))
    if TABLES in case.files and (fault := _table_fault(case, targets & {*case.base.gpus})):
        return Verdict("accepted", f"wrong acceptance, {case.part}: {fault}")
    if refused:
        return Verdict("refused at a call", "")
    if not other:
        everything = all(gpu in targets for gpu in case.base.gpus)
        return Verdict(
            f"accepted, the same ({case.part})" if everything else "refused for a GPU, the same for others", ""
        )
    parts = set(case.part.split(" and "))
    if all(name.endswith(" launch") for name in other):
        parts.add("launch")
    if _served(json.loads(case.files[MANIFEST])) != _served(case.base.manifest):
        parts.add("layers")
    if free := parts & (rules.PARTS - rules.BOUND_BY_DIGEST):
        return Verdict(f"accepted within bounds ({min(free)})", "")
    return Verdict("accepted", f"wrong acceptance, {case.part}: other {', '.join(other)}"[:300])


def _done(folder: Path, base: Base, gradients: bool) -> tuple[str, Behaviour]:
    """The behaviour of the package in a folder; first the error of a call that it refuses.

    Raises:
        SurgeonError: it is refused when it is loaded.
    """
    gpu_recorder.pretend_a_gpu()
    package = load(folder, strict=True, device="cpu")
    try:
        return "", behaviour(package, base.shape, base.layers, _gpus(package, base), gradients)
    except SurgeonError as error:
        return str(error), {}


def _may_lack(name: str, case: Case, targets: set[str]) -> bool:
    """True for what was not tried, for GPUs that a package no longer names, and for kernels that have substitutes."""
    target, *call = name.split()
    if target == "gradients":
        return SCHEDULE not in case.files
    return target in case.base.gpus and (target not in targets or call[:2] == ["one", "query"])


def _gpus(package: Package, base: Base) -> list[str]:
    """The GPUs that the package says it has kernels for; a target that it lacks is refused when it is wanted."""
    return [target for target in (*base.gpus, *OTHER_GPUS) if target in package.manifest.targets]


OTHER_GPUS = ("cuda:80", "hip:gfx90a")


def _served(manifest: Json) -> set[tuple[Any, ...]]:
    """The layers that each kernel serves."""
    return {
        (kernel["target"], kernel["phase"], kernel["symbol"], *sorted(kernel["layers"]))
        for kernel in manifest["kernels"]
    }


def _table_fault(case: Case, targets: set[str]) -> str:
    """The first fault of the tables that these targets' kernels are given; others are not read."""
    kernels = json.loads(case.files[MANIFEST])["kernels"]
    schedules = {layer: kernel["schedule"] for kernel in kernels if kernel["schedule"] for layer in kernel["layers"]}
    readers = [kernel for kernel in kernels if kernel["table"] and kernel["target"] in targets]
    names = sorted({f"{schedules[layer]}.{kernel['table']}" for kernel in readers for layer in kernel["layers"]})
    tables = safetensors.numpy.load(case.files[TABLES]) if names else {}
    return out_of_bounds(tables, tuple(names), case.base.shape.num_key_value_heads)


# Changes to the manifest


def _change_manifest(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    where = rng.randrange(10)
    if where < 4:
        rng.choice(CHANGES)(manifest, rng)
    else:
        of = (kernels, kernels, rng.choice(kernels), manifest["model"], manifest, manifest["files"])[where - 4]
        json_mutations.mutate(of, rng)


def _field_of_another(manifest: Json, rng: random.Random) -> None:
    one, other = rng.choice(manifest["kernels"]), rng.choice(manifest["kernels"])
    names = rng.sample(sorted(one), rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.3:
        names = ["schedule", "symbol"]
    for name in names:
        if rng.random() < 0.7:
            one[name], other[name] = other[name], one[name]
        else:
            one[name] = copy.deepcopy(other[name])


def _layers(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    one, other = rng.choice(kernels), rng.choice(kernels)
    choice = rng.randrange(6)
    if choice == 0:
        one["layers"] = one["layers"] + other["layers"]
        kernels.remove(other)
    elif choice == 1:
        moved = one["layers"].pop(rng.randrange(len(one["layers"])))
        other["layers"].append(moved)
    elif choice == 2:
        layer = rng.choice((0, 1, 2, 3, 4, -1))
        manifest["layers"] = sorted({*manifest["layers"]} ^ {layer})
        for kernel in kernels:
            if rng.random() < 0.7:
                kernel["layers"] = sorted({*kernel["layers"]} ^ {layer})
    elif choice == 3:
        one["layers"] *= 2
    elif choice == 4:
        rng.choice((manifest, one))["layers"].reverse()
    else:
        for kernel in kernels:  # every layer takes another's place
            kernel["layers"] = [{0: 2, 2: 0}.get(layer, layer) for layer in kernel["layers"]]


def _kernels(manifest: Json, rng: random.Random) -> None:
    kernels = manifest["kernels"]
    choice = rng.randrange(5)
    if choice == 0:
        kernels.append(copy.deepcopy(rng.choice(kernels)))
    elif choice == 1:
        kernels.pop(rng.randrange(len(kernels)))
    elif choice == 2:
        rng.shuffle(kernels)
    elif choice == 3:  # every kernel once more, for another dtype or target
        name, values = rng.choice((("dtype", ("fp32", "bf16", "fp16", "fp8")), ("target", ("cpu", *OTHER_GPUS, "x"))))
        value = rng.choice(values)
        kernels += [kernel | {name: value} for kernel in copy.deepcopy(kernels) if kernel[name] != value]
    else:
        old, value = rng.choice(kernels), rng.choice(("fp32", "bf16", "fp16"))
        for kernel in kernels:
            if kernel["target"] == old["target"]:
                kernel["dtype"] = value


def _heads(manifest: Json, rng: random.Random) -> None:
    kernels, heads = manifest["kernels"], manifest["model"]["num_attention_heads"]
    one = rng.choice(kernels)
    middle = rng.choice((0, 1, 2, heads, heads + 1, -1))
    if rng.random() < 0.5:
        one["heads"] = rng.choice(([0, heads], [0, middle], [middle, heads], [middle, middle], [0, 1, 2]))
    else:
        kernels.append(copy.deepcopy(one) | {"heads": [middle, heads]})
        one["heads"] = [0, middle]


def _launch(manifest: Json, rng: random.Random) -> None:
    kernel = rng.choice(manifest["kernels"])
    if kernel["launch"] is None:
        kernel["launch"] = {"grid": ["one", "one", "one"], "tile_rows": 1, "threads": 1, "shared_bytes": 0}
        return
    name = rng.choice(("tile_rows", "threads", "shared_bytes"))
    now = kernel["launch"][name]
    kernel["launch"][name] = rng.choice((0, 1, now * 2, now // 2, now + 1, -now, 32, 1024, 1025, 2**31, 2**40, 10**20))


def _number(manifest: Json, rng: random.Random) -> None:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    name = rng.choice((*names, "num_blocks", "block_size", "beyond", "weights_sha256", "model_type", "topology_sha256"))
    fields = manifest["model"] if name in manifest["model"] else manifest
    now = fields[name]
    if isinstance(now, int):
        fields[name] = rng.choice((now + 1, now - 1, now * 2, now // 2, 0, -now, 10**9, float(now), 2**63, Raw("1e2")))
    else:
        fields[name] = rng.choice(
            ("window", "dense", "error", "llama", "qwen2", "0" * 64, None, "", (now or "x").upper())
        )


def _paths(manifest: Json, rng: random.Random) -> None:
    entry = rng.choice(manifest["files"])
    path = entry["path"]
    others = (
        f"./{path}",
        f"../{path}",
        f"/{path}",
        f"{path}/",
        path.upper(),
        f"a/../{path}",
        f"{path}\0",
        "",
        ".",
        "..",
    )
    changes: tuple[Json, ...] = (
        *(
            {"path": other}
            for other in (*others, path.replace("/", "\\"), path.replace("/", "//"), "\ud800", "manifest.json")
        ),
        *({"size": size} for size in (entry["size"] + 1, entry["size"] - 1, -1, 2**30, 2**30 + 1, 2**64)),
        *({"sha256": text} for text in (entry["sha256"].upper(), entry["sha256"][:-1], "", " " + entry["sha256"])),
    )
    entry |= rng.choice(changes)


def _everywhere(manifest: Json, rng: random.Random) -> None:
    """Two names exchanged in the whole manifest."""
    kernels = manifest["kernels"]
    name = rng.choice(("schedule", "symbol", "file", "dtype", "target"))
    one, other = rng.choice(kernels)[name], rng.choice(kernels)[name]
    for kernel in kernels:
        kernel[name] = {one: other, other: one}.get(kernel[name], kernel[name])
        if name == "schedule" and rng.random() < 0.9 and kernel["symbol"].startswith("surgeon_"):
            kernel["symbol"] = f"surgeon_{kernel['schedule']}"


CHANGES: tuple[Callable[[Json, random.Random], None], ...] = (
    *(_field_of_another, _field_of_another, _layers, _layers, _kernels, _heads, _launch, _number, _number, _paths),
    _everywhere,
)


# Changes to files, whose sizes and hashes the manifest then has


def _changed_topology(base: Base, manifest: Json, rng: random.Random) -> bytes:
    """Another topology; in half of the cases the manifest says of it what it said of the original."""
    document: Json = json.loads(base.files[TOPOLOGY])
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


def _changed_tensors(data: bytes, rng: random.Random) -> bytes:
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
    arrays = {name: array.copy() for name, array in _arrays(data).items()}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(arrays))
        changed = rng.choice(ARRAYS)(arrays, name, rng)
        if changed is None:
            arrays.pop(name)
        else:
            arrays[name] = np.ascontiguousarray(changed)
    return safetensors.numpy.save(arrays)


@functools.cache
def _arrays(data: bytes) -> Arrays:
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


def _run(shared: Shared, rng: random.Random) -> Verdict:
    case = make(shared, rng)
    key = os.getpid(), id(case.base)
    folder = _copies.get(key) or _copies.setdefault(key, copied(shared.folder, case.base))
    for path, data in case.files.items():
        (folder / path).write_bytes(data)
    try:
        return judge(case, folder)
    finally:
        for path in case.files:
            (folder / path).write_bytes(case.base.files[path])


def _describe(shared: Shared, rng: random.Random) -> str:
    case = make(shared, rng)
    lines = [f"{case.part} of a package for {', '.join(('cpu', *case.base.gpus))}"]
    for path, data in case.files.items():
        lines += [f"{path}:", *_differing(case.base.files[path], data)]
    return "\n".join(lines)


def _differing(before: bytes, after: bytes) -> list[str]:
    """The lines or numbers that differ."""
    with contextlib.suppress(Exception):
        one, other = _arrays(before), safetensors.numpy.load(after)
        names = sorted(name for name in {*one, *other} if not np.array_equal(one.get(name), other.get(name)))
        return [f"  {name}: {one.get(name)!r}\n  now {other.get(name)!r}" for name in names]
    with contextlib.suppress(Exception):
        texts = [json.dumps(json.loads(data), indent=1).splitlines() for data in (before, after)]
        return [f"  {line}" for line in difflib.unified_diff(*texts, lineterm="", n=2)]
    return [f"  {after!r:.2000}"]


KIND = Kind("packages", prepare, _run, _describe)
