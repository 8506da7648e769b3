"""A small part of the fuzzer's cases, and faults planted to see that it finds each kind of them."""

import ctypes
import faulthandler
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fuzzing import cases, package_cases, package_checker, rules, topology_cases, topology_checker
from fuzzing.cases import Kind, Progress, Verdict
from surgeon.compiler.topology import read
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.runtime.errors import PackageError, TopologyError
from surgeon.runtime.kernels.cpu.library import CpuLibrary
from surgeon.runtime.package.kernel_digest import digest_symbol
from surgeon.runtime.package.manifest import Manifest
from topology_faults import FAULTS

ROOT = Path(__file__).parents[1]


def run(kind: Kind, count: int, jobs: int = 1, seed: int = 0) -> Progress:
    progress = Progress()
    for _ in cases.run(kind, seed, progress, count, jobs):
        pass
    assert progress.next == count
    assert progress.outcomes.total() == count
    return progress


def found(progress: Progress, *outcomes: str) -> int:
    """The number of cases whose outcome begins like one of these."""
    return sum(count for outcome, count in progress.outcomes.items() if outcome.startswith(outcomes))


# The fuzzer itself


def test_topologies() -> None:
    progress = run(topology_cases.KIND, 800)
    assert progress.faults == {}
    assert min(found(progress, "accepted, compared"), found(progress, "refused") // 10) >= 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> package_cases.Shared:
    return package_cases.prepare(tmp_path_factory.mktemp("fuzz"))


def of(shared: package_cases.Shared) -> Kind:
    """The kind of packages, with packages that are there already."""
    return package_cases.KIND._replace(prepare=lambda _folder: shared)


def test_packages(shared: package_cases.Shared) -> None:
    progress = run(of(shared), 400)
    assert progress.faults == {}
    assert found(progress, "accepted") >= 40
    assert found(progress, "refused") >= 150


def test_the_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    command = [sys.executable, "-m", "tests.fuzz", "topologies", "--cases", "30", "--jobs", "2", "--state", str(state)]
    for expected in ("cases 0 to 29", "cases 30 to 59"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in done.stdout
    whole = run(topology_cases.KIND, 60)
    assert json.loads(state.read_text())["kinds"]["topologies"]["outcomes"] == dict(whole.outcomes)


def test_a_state_of_another_seed_is_not_continued(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    cases.store(state, 1, "topologies", Progress(7, Counter({"refused": 7}), {3: "a fault"}, 0.5))
    assert cases.stored(state, 1, "topologies") == Progress(7, Counter({"refused": 7}), {3: "a fault"}, 0.5)
    with pytest.raises(SystemExit, match="it continues seed 1"):
        cases.stored(state, 2, "topologies")


# Its runner


def planted(outcomes: dict[int, Callable[[], Any]]) -> Kind:
    """Cases that are counted up, of which some do something else."""

    def do(at: list[int], rng: random.Random) -> Verdict:
        case = numbers[rng.random()]
        outcomes.get(case, lambda: None)()
        return Verdict("fine", "a wrong acceptance" if case == 13 else "")

    numbers = {cases.numbers(0, "planted", case).random(): case for case in range(1000)}
    return Kind("planted", lambda _folder: [0], do, lambda _shared, _rng: "")


def overflow() -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("jobs", [1, 2])
def test_crashes_and_tracebacks_are_found_in_their_cases(jobs: int) -> None:
    kind = planted({5: overflow, 17: lambda: {}["a"], 450: lambda: os._exit(3), 900: lambda: sys.exit("no")})
    progress = run(kind, 950, jobs)
    assert progress.outcomes == {"fine": 946, "crash": 2, "traceback": 2}
    assert {case: fault.partition(" (")[0] for case, fault in sorted(progress.faults.items())} == {
        5: "crash: SIGSEGV",
        13: "a wrong acceptance",
        17: "traceback: KeyError: 'a'",
        450: "crash: status 3",
        900: "traceback: SystemExit: no",
    }


def test_a_case_without_an_end_or_without_measure_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CPU_SECONDS", 0.1)

    def forever() -> None:
        while True:
            pass

    progress = run(planted({2: forever, 4: lambda: bytearray(2 * cases.EXTRA_BYTES)}), 6)
    assert progress.faults[2] == "crash: SIGXCPU"
    assert progress.faults[4].startswith("traceback: MemoryError")


# The checker of topologies


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_checker_sees_every_fault_of_a_topology(fault: Any) -> None:
    with pytest.raises(topology_checker.InvalidError):
        topology_checker.check(json.dumps(fault.document()).encode())


def accepting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reader of topologies miss something."""
    if name == "integers":
        monkeypatch.setattr(read, "integer", lambda value, *_: int(value))
    elif name == "keys":
        monkeypatch.setattr(read, "object_of", lambda value, where, required, optional=(): value)
    elif name == "trees":
        checked = Dendrogram.from_linkage

        def forgiving(rows: Any, num_blocks: int, where: str) -> Dendrogram:
            try:
                return checked(rows, num_blocks, where)
            except TopologyError:
                return Dendrogram.from_paths([[0]] * num_blocks, 2, where)

        monkeypatch.setattr(Dendrogram, "from_linkage", forgiving)
    elif name == "heights":
        whole = Dendrogram.labels
        monkeypatch.setattr(Dendrogram, "labels", lambda tree, cut: whole(tree, cut / 2))
    elif name == "JSON":
        monkeypatch.setattr(read, "parse_json", lambda text, where, fault: json.loads(text))
    elif name == "refusals":
        monkeypatch.setattr(read, "MAX_DEPTH", 5)
    elif name == "encodings":
        monkeypatch.setattr(
            read, "read_document", lambda path, limit, parse, *_: parse(path.read_bytes().decode("utf-8-sig"))
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("integers", ("wrong acceptance", "traceback")),
        ("keys", ("traceback: KeyError", "wrong acceptance: keys")),
        ("trees", ("wrong acceptance: a falling height", "wrong acceptance: nodes of a merge")),
        ("heights", ("the schedule is not what the definition says",)),
        ("JSON", ("traceback: JSONDecodeError",)),
        ("refusals", ("wrong refusal of a valid topology",)),
        ("encodings", ("traceback: UnicodeDecodeError",)),
    ],
)
def test_a_reader_with_a_fault_is_found_out(name: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    accepting(name, monkeypatch)
    faults = run(topology_cases.KIND, 500).faults.values()
    for word in words:
        assert any(word in fault for fault in faults), Counter(faults)


# The checker of packages


@pytest.mark.parametrize(
    ("part", "place", "number", "words"),
    [
        ("rows", (0, 0), 7, "has no plan"),
        ("plans", (0, 2), 0, "row 0 has no plan"),
        ("plans", (0, 2), 99, "row 0 has no plan"),
        ("segments", (0, 0), -(10**6), "row 0 reads blocks -1000000 to"),
        ("segments", (0, 1), 2**31 - 1, "row 0 reads blocks 0 to 2147483647"),
        ("segments", (0, 2), 4, "reads blocks"),
        ("segments", (2, 0), -1, "row 1 has segments out of order"),
        ("segments", (2, 1), -1, "reads blocks"),
    ],
)
def test_the_checker_sees_numbers_of_a_table_out_of_bounds(part: str, place: Any, number: int, words: str) -> None:
    tables = {
        "t.rows": np.array([[0, 1]], dtype=np.int32),
        "t.plans": np.array([[0, 0, 1], [1, 1, 3]], dtype=np.int32),
        "t.segments": np.array([[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 3, 3]], dtype=np.int32),
    }
    assert package_checker.out_of_bounds(tables, ("t",), patterns=1) == ""
    tables[f"t.{part}"][place] = number
    assert words in package_checker.out_of_bounds(tables, ("t",), patterns=1)


Judge = Callable[..., Verdict]


@pytest.fixture
def judge(shared: package_cases.Shared) -> Iterator[Judge]:
    """Judges the package for a CPU, with other files and a changed manifest."""
    base = shared.bases[0]
    folder = package_cases.copied(shared.folder, base)

    def judged(change: Callable[[dict[str, Any]], object] = lambda _: None, **files: bytes) -> Verdict:
        manifest = json.loads(base.files["manifest.json"])
        changed = {f"{name}.safetensors": data for name, data in files.items()}
        for entry in manifest["files"]:
            if data := changed.get(entry["path"]):
                entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        change(manifest)
        changed["manifest.json"] = json.dumps(manifest).encode()
        for path, data in changed.items():
            (folder / path).write_bytes(data)
        return package_cases.judge(package_cases.Case(base, next(iter(files), "manifest"), changed), folder)

    yield judged
    for path, data in base.files.items():
        (folder / path).write_bytes(data)


@pytest.fixture
def believing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reader of packages compare nothing with topology.json and with the library's digests."""
    checked = CpuLibrary.kernel

    def any_kernel(library: CpuLibrary, symbol: str, _digest: str) -> Any:
        digest = getattr(library._library, digest_symbol(symbol))
        digest.restype = ctypes.c_char_p
        return checked(library, symbol, digest().decode())

    monkeypatch.setattr(CpuLibrary, "kernel", any_kernel)
    monkeypatch.setattr("surgeon.runtime.package.reader.check_topology", lambda *_: None)
    monkeypatch.setattr("surgeon.runtime.package.reader._check_kernels", lambda *_: None)


def other_schedule(shared: package_cases.Shared, name: str, place: tuple[int, int], number: int) -> bytes:
    tensors = safetensors.numpy.load(shared.bases[0].files["schedule.safetensors"])
    tensors[name][place] = number
    return safetensors.numpy.save(tensors)


def test_what_does_not_matter_may_change(judge: Judge) -> None:
    assert judge() == ("accepted, the same (manifest)", "")
    assert judge(lambda manifest: manifest["tools"].clear()) == ("accepted, the same (manifest)", "")


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "model": lambda manifest: manifest["model"].update(model_type="qwen2"),
    "blocks": lambda manifest: manifest.update(num_blocks=7),
    "dtypes": lambda manifest: [kernel.update(dtype="bf16") for kernel in manifest["kernels"]],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_reader_that_believes_the_manifest_is_found_out(judge: Judge, believing: None, name: str) -> None:
    assert (
        f"wrong acceptance, manifest: other {'attention' if name == 'dtypes' else name}" in judge(MANIFESTS[name]).fault
    )


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_reader_believes_no_manifest(judge: Judge, name: str) -> None:
    assert judge(MANIFESTS[name]) == ("refused", "")


SCHEDULES = {"liveness": ("attention_001.last_readers", (0, 0), 0), "gradients": ("attention_000.runs", (0, 1), 2)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_reader_that_believes_schedules_is_found_out(
    judge: Judge, shared: package_cases.Shared, believing: None, name: str
) -> None:
    verdict = judge(schedule=other_schedule(shared, *SCHEDULES[name]))
    assert verdict.fault.startswith("wrong acceptance, schedule: other")
    assert name in verdict.fault


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_reader_believes_no_schedule(judge: Judge, shared: package_cases.Shared, name: str) -> None:
    assert judge(schedule=other_schedule(shared, *SCHEDULES[name])) == ("refused", "")


def test_what_no_digest_holds_is_only_counted(
    judge: Judge, shared: package_cases.Shared, believing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "BOUND_BY_DIGEST", rules.PARTS - {"schedule"})
    verdict = judge(schedule=other_schedule(shared, *SCHEDULES["gradients"]))
    assert verdict == ("accepted within bounds (schedule)", "")


def test_a_reader_that_believes_tables_is_found_out(
    shared: package_cases.Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(shared.bases) < 2:
        pytest.skip("no Triton")
    monkeypatch.setattr("surgeon.runtime.package.segment_table._check_segments", lambda *_: None)
    faults = run(of(shared), 700).faults.values()
    assert any("wrong acceptance, tables: attention_000.decode: row" in fault for fault in faults), Counter(faults)


def test_a_reader_with_a_traceback_is_found_out(shared: package_cases.Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Manifest.from_json

    def careless(text: str) -> Manifest:
        try:
            return read_text(text)
        except PackageError:
            return json.loads(text)["kernels"]  # type: ignore[no-any-return]

    monkeypatch.setattr(Manifest, "from_json", careless)
    assert found(run(of(shared), 60), "traceback") >= 5
