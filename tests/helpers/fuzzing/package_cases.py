"""Cases of packages: changed manifests, and, with hashes that agree, changed topologies, schedules and tables."""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

import gpu_calls
import topologies
from fuzzing import gpu_recorder, json_mutations, rules
from fuzzing.cases import Kind, Verdict
from fuzzing.file_changes import arrays_of, changed_tensors, changed_topology
from fuzzing.manifest_changes import OTHER_GPUS, Json, change_manifest
from fuzzing.package_checker import Behaviour, behaviour, out_of_bounds
from surgeon.compiler import compile_package
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import load
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.loading import Package
from surgeon.runtime.package.manifest import ModelShape

MANIFEST, TOPOLOGY, SCHEDULE, TABLES = "manifest.json", "topology.json", "schedule.safetensors", "tables.safetensors"


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
        changed[TOPOLOGY] = changed_topology(base.files[TOPOLOGY], manifest, rng)
        manifest["topology_sha256"] = hashlib.sha256(changed[TOPOLOGY].removesuffix(b"\n")).hexdigest()
    elif part in ("schedule", "tables"):
        file = SCHEDULE if part == "schedule" else TABLES
        changed[file] = changed_tensors(base.files[file], rng)
    for entry in manifest["files"]:
        if (data := changed.get(entry["path"])) is not None:
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if part == "manifest" or rng.random() < 0.05:
        part = "manifest" if part == "manifest" else f"manifest and {part}"
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            with contextlib.suppress(
                ArithmeticError, AttributeError, LookupError, TypeError, ValueError
            ):  # it is broken
                change_manifest(manifest, rng)
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
        one, other = arrays_of(before), safetensors.numpy.load(after)
        names = sorted(name for name in {*one, *other} if not np.array_equal(one.get(name), other.get(name)))
        return [f"  {name}: {one.get(name)!r}\n  now {other.get(name)!r}" for name in names]
    with contextlib.suppress(Exception):
        texts = [json.dumps(json.loads(data), indent=1).splitlines() for data in (before, after)]
        return [f"  {line}" for line in difflib.unified_diff(*texts, lineterm="", n=2)]
    return [f"  {after!r:.2000}"]


KIND = Kind("packages", prepare, _run, _describe)
