"""The C++ of a CPU library and its compilation: rendering, recompilation, and failures."""

import platform
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from processes import ended
from surgeon.compiler.kernels.cpu.build import Compiler, build_cpu, find_compiler
from surgeon.compiler.kernels.cpu.render import render_cpu
from surgeon.compiler.kernels.cpu.variants import PORTABLE, X86_64, variants_for
from surgeon.compiler.schedule.liveness import liveness_tables
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import CpuSource
from surgeon.compiler.specs.kernel_spec import CpuSpec
from surgeon.compiler.specs.specialize import specialize_cpu
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.compilers import time_limit
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.target import DTYPES, Target
from topologies import build, head, window_topology

Golden = Callable[[str, str], None]


def cpu_specs(topology: Topology, dtypes: Sequence[str] | None = None) -> tuple[CpuSpec, ...]:
    layers = schedule_layers(topology)
    return specialize_cpu(topology, layers, Target("cpu"), dtypes, None, liveness_tables(layers))


def rendered(topology: Topology, machine: str = platform.machine()) -> CpuSource:
    specs = cpu_specs(topology)
    return render_cpu(specs, variants_for(machine))


def small() -> Topology:
    """Two different layers: a window, and clusters that are not contiguous; one head is in both."""
    scattered = {"paths": [[0, 0], [1, 0], [0, 0], [1, 1], [0, 1], [1, 0]], "arity": 2}
    first = [head(0, 0.0, sink=1, window=2), head(0, 1.0, window=1)]
    second = [head(0, 1.0, window=1), {"dense": True}]
    return build([first, second, first], [scattered], num_kv_heads=1, num_blocks=6, head_dim=64)


def test_the_schedule_as_constants(golden: Golden) -> None:
    files = {file.path: file.text for file in rendered(small()).files}
    golden("schedule.cpp.txt", files["cpu/schedule.cpp"])


def test_the_interface(golden: Golden) -> None:
    files = {file.path: file.text for file in rendered(small()).files}
    golden("call.h.txt", files["cpu/call.h"])


def test_only_the_schedule_and_the_interface_know_the_topology() -> None:
    one, other = rendered(small()), rendered(window_topology([3, 4], head_dim=64))
    differing = {a.path for a, b in zip(one.files, other.files, strict=True) if a.text != b.text}
    assert differing == {"cpu/schedule.cpp"}


def test_a_machine_that_is_no_x86_64_builds_the_portable_variant() -> None:
    assert variants_for("aarch64") == (PORTABLE,)
    assert variants_for("x86_64") == X86_64
    paths = {file.path for file in rendered(small(), "aarch64").files}
    assert "cpu/portable.cpp" in paths
    assert not [path for path in paths if "x86_64" in path]


def test_the_kernels_of_the_manifest(tmp_path: Path) -> None:
    binary = build_cpu(rendered(small()), Cache.default(), jobs=2)
    assert [(kernel.symbol, kernel.dtype, kernel.layers) for kernel in binary.kernels] == [
        (f"surgeon_attention_{number:03d}", dtype, layers)
        for number, layers in ((0, (0, 2)), (1, (1,)))
        for dtype in DTYPES
    ]
    library = tmp_path / "attention.so"
    library.write_bytes(binary.data)
    listing = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert exported == {
        "surgeon_abi_version",
        "surgeon_attention_000",
        "surgeon_attention_000_digest",
        "surgeon_attention_001",
        "surgeon_attention_001_digest",
        "surgeon_call_bytes",
        "surgeon_supports",
        "surgeon_variant",
        "surgeon_write_pages",
    }


def test_two_builds_are_equal_and_name_no_folder(tmp_path: Path) -> None:
    source = rendered(small())
    first = build_cpu(source, Cache(tmp_path / "one"), jobs=2)
    second = build_cpu(source, Cache(tmp_path / "two"), jobs=1)
    assert first == second
    assert b"/tmp" not in first.data
    assert str(Path.home()).encode() + b"/" not in first.data


class Counting:
    """A compiler that counts its runs: a script around the real one, taken by $CXX."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "runs"
        self.command = folder / "counting-g++"
        real = find_compiler(None).command
        self.command.write_text(f'#!/bin/sh\necho "$@" >> {self._log}\nexec {real} "$@"\n')
        self.command.chmod(self.command.stat().st_mode | stat.S_IXUSR)

    def runs(self) -> list[str]:
        """The source files compiled since the last call, or "link"."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.write_text("")
        return sorted(
            "link" if "-shared" in line else next(word for word in line.split() if word.endswith(".cpp"))
            for line in lines
            if "--version" not in line
        )


def test_only_what_changed_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(tmp_path)
    monkeypatch.setenv("CXX", str(counting.command))
    cache = Cache(tmp_path / "cache")
    units = [
        "driver.cpp",
        "schedule.cpp",
        "write.cpp",
        *(f"{variant.name}.cpp" for variant in variants_for(platform.machine())),
    ]
    build_cpu(rendered(small()), cache, jobs=2)
    assert counting.runs() == sorted([*units, "link"])
    build_cpu(rendered(small()), cache, jobs=2)
    assert counting.runs() == []
    build_cpu(rendered(window_topology([3, 4], head_dim=64)), cache, jobs=2)
    assert counting.runs() == ["link", "schedule.cpp"]


def test_progress_reaches_its_end() -> None:
    reports: list[tuple[str, int, int]] = []
    build_cpu(rendered(small()), Cache.default(), 2, lambda *report: reports.append(report))
    total = len(variants_for(platform.machine())) + 4
    assert reports[0] == ("compiling for cpu", 0, total)
    assert reports[-1] == ("compiling for cpu", total, total)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    find_compiler.cache_clear()
    with pytest.raises(
        BuildError, match=r"expected a C\+\+ compiler \(g\+\+ or clang\+\+\) on PATH, got none; install one"
    ):
        build_cpu(rendered(small()), Cache(tmp_path), jobs=1)
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(BuildError, match=r"expected the C\+\+ compiler icpx \(from \$CXX\), got none"):
        build_cpu(rendered(small()), Cache(tmp_path), jobs=1)
    find_compiler.cache_clear()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "broken 1.0";; *) echo "x.cpp:1: error: no luck" >&2; exit 4;; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=r"got exit status 4: x\.cpp:1: error: no luck; write the sources with --dump"):
        build_cpu(rendered(small()), Cache(tmp_path / "cache"), jobs=2)
    assert not list(tmp_path.glob("cache/*"))


def wrapped(folder: Path, script: str) -> str:
    """A compiler that is this script for every call but `--version`; `"$@"` are the real one's arguments."""
    command = folder / "wrapped-g++"
    real = find_compiler(None).command
    command.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "wrapped 1.0"; exit;; esac\nreal={real}\n{script}\n')
    command.chmod(0o755)
    return str(command)


@pytest.mark.parametrize(
    ("linked", "said"),
    [
        ("echo garbage > out", "(too short|invalid ELF header)"),
        (": > out", "too short"),
        ("echo 'int x;' > x.c && $real -shared -x c x.c -o out", "undefined symbol: surgeon_abi_version"),
        ('$real "$@" && head -c 40000 out > cut && mv cut out', "got "),
    ],
    ids=["text", "nothing", "another library", "half of it"],
)
def test_a_linker_that_fails_without_saying_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linked: str, said: str
) -> None:
    link = f'case "$*" in *-shared*) {linked};; *) exec $real "$@";; esac'
    monkeypatch.setenv("CXX", wrapped(tmp_path, link))
    cache = Cache(tmp_path / "cache")
    for _ in range(2):  # what is wrong is not kept
        with pytest.raises(BuildError, match=rf"the linked library: expected one that loads .* 1 kernels, .*{said}"):
            build_cpu(plain_source(), cache, jobs=2)


def plain_source() -> CpuSource:
    """A source that compiles quickly: the portable kernels alone, for one dtype."""
    topology = window_topology([1, 2], head_dim=32)
    specs = cpu_specs(topology, ["fp32"])
    return render_cpu(specs, (replace(PORTABLE, flags=("-O0",)),))


def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", wrapped(tmp_path, f"sleep 600 & echo $! >> {tmp_path}/sleeping; wait"))
    monkeypatch.setenv("SURGEON_COMPILER_SECONDS", "0.5")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        BuildError, match=r"wrapped 1\.0: \w+\.cpp: expected an end within 0\.5 s, got .*SURGEON_COMPILER_SECONDS"
    ):
        build_cpu(plain_source(), Cache(tmp_path / "cache"), jobs=2)
    for number in (tmp_path / "sleeping").read_text().split():
        ended(int(number))
    assert not list(tmp_path.glob("surgeon-*"))


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1e300"])
def test_a_time_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SURGEON_COMPILER_SECONDS", text)
    with pytest.raises(BuildError, match=r"SURGEON_COMPILER_SECONDS: expected a number of seconds, or 0 for no limit"):
        time_limit()


def test_no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_COMPILER_SECONDS", "0")
    assert time_limit() is None


def test_the_compiler_is_known_by_its_version() -> None:
    found = find_compiler(None)
    assert isinstance(found, Compiler)
    assert Path(found.command).is_absolute()
    assert found.version
