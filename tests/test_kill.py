"""kill -9 in the middle of a compile: under the package's name stands the old package or the new one, never less."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import topologies
from processes import ended
from surgeon.runtime import load
from surgeon.runtime.package.reader import read_package

COMPILE = "import sys; from surgeon.compiler.cli.main import main_compile; sys.exit(main_compile())"

AS_IN_A_TERMINAL = (
    "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)
"""Undoes what nohup and a shell's background leave ignored, so that the tests can run there too."""

# Reads numbers. For each n, forks a compile that kills itself just before the n-th time that it changes something
# below a folder, and prints how that ended. The swap of the two folders is a call through ctypes, of which only the
# look-up of the library is seen; the removal of the old package, which follows it, is seen again.
COMPILES_CUT_SHORT = """
import os, signal, sys
from surgeon.compiler.cli.main import main_compile
folder, arguments = sys.argv[1], sys.argv[2:]

def changes(event, details):
    if event == "open":
        path, _, flags = details
        return str(path).startswith(folder) and flags & (os.O_WRONLY | os.O_RDWR)
    if event == "ctypes.dlopen":
        return details[0] is None
    if event in ("os.mkdir", "os.chmod", "os.rename", "shutil.rmtree"):
        return str(details[0]).startswith(folder)
    return event in ("os.remove", "os.rmdir")

def count(event, details):
    global steps_left
    if changes(event, details):
        steps_left -= 1
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    steps_left = int(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        sys.addaudithook(count)
        os._exit(main_compile(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Workshop:
    """Two topologies, their finished packages, and a cache that already holds what both need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SURGEON_CACHE": str(folder / "cache")}
        self.ids = {}
        for name, window in (("old", 1), ("new", 2)):
            document = topologies.document(
                [[topologies.head(window=window)]], [{"linkage": [[0, 1, 1.0, 2]]}], num_blocks=2
            )
            (folder / f"{name}.json").write_text(json.dumps(document))
            self.compile(name, folder / name)
            self.ids[name] = read_package(folder / name).id

    def arguments(self, name: str, out: Path) -> list[str]:
        return [str(self.folder / f"{name}.json"), "--out", str(out), "--dtype", "fp32", "--jobs", "1"]

    def compile(self, name: str, out: Path) -> None:
        command = [sys.executable, "-c", COMPILE, *self.arguments(name, out)]
        subprocess.run(command, env=self.environment, check=True, timeout=600)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("replaces", [True, False], ids=["over an old package", "where there was none"])
def test_a_compile_killed_at_any_step_leaves_a_whole_package(
    workshop: Workshop, tmp_path: Path, replaces: bool
) -> None:
    out = tmp_path / "kernels"
    found = []
    command = [sys.executable, "-c", COMPILES_CUT_SHORT, str(tmp_path), *workshop.arguments("new", out)]
    with subprocess.Popen(
        command, env=workshop.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as compiles:
        assert compiles.stdin is not None
        assert compiles.stdout is not None
        for step in range(1, 1000):
            shutil.rmtree(out, ignore_errors=True)
            if replaces:
                shutil.copytree(workshop.folder / "old", out)
            print(step, file=compiles.stdin, flush=True)
            status = int(compiles.stdout.readline())
            found.append(read_package(out).id if out.exists() else None)
            if status == 0:
                break
            assert status == -signal.SIGKILL
        compiles.stdin.close()
    before, after = workshop.ids["old"] if replaces else None, workshop.ids["new"]
    swapped = found.index(after)
    assert found == [before] * swapped + [after] * (len(found) - swapped)
    assert swapped >= 6, "a folder and at least five files come before the swap"
    assert len(found) - swapped > replaces, "the old package was never seen to be removed after the swap"
    # Every run but the last died and left its work beside the package; the last one has removed that.
    assert load(out).id == after
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, 128 + signal.SIGTERM, "surgeon: ended by SIGTERM\n"),
        (signal.SIGHUP, 128 + signal.SIGHUP, "surgeon: ended by SIGHUP\n"),
        (signal.SIGINT, 128 + signal.SIGINT, "surgeon: interrupted\n"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_compile_ended_while_compilers_run_leaves_the_old_package(
    workshop: Workshop, tmp_path: Path, number: signal.Signals, status: int, said: str
) -> None:
    out, started, compiler = tmp_path / "kernels", tmp_path / "started", tmp_path / "slow-g++"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shutil.copytree(workshop.folder / "old", out)
    compiler.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo slow; exit; fi\nsleep 600 &\necho $! > "{started}.new"\n'
        f'mv "{started}.new" "{started}"\nwait\n'
    )
    compiler.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL + COMPILE, *workshop.arguments("new", out)],
        env=workshop.environment | {"CXX": str(compiler), "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not started.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sleeping = int(started.read_text())
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors == said
    if number == signal.SIGKILL:
        os.killpg(os.getpgid(sleeping), signal.SIGKILL)  # the compilers that outlived it
    else:
        ended(sleeping)
        assert list(scratch.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels", "scratch", "slow-g++", "started"]
    assert read_package(out).id == workshop.ids["old"]
    assert load(out).id == workshop.ids["old"]

    workshop.compile("new", out)
    assert read_package(out).id == workshop.ids["new"]
