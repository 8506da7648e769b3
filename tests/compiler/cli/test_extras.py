"""Commands without an extra that they need: one line that names it, before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import RUN

ROOT = Path(__file__).parents[3]
PILOT = ROOT / "benchmarks" / "results" / "pilot-smollm2-135m-25-answers.json"
TOPOLOGY = ROOT / "benchmarks" / "topologies" / "smollm2-135m-25-answers.json"
MODEL: list[str | Path] = ["--text", ROOT / "benchmarks" / "text" / "lighthouse.txt", "--density", "0.5"]


def refusal(missing: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    """The line on standard error of a command that is refused because a package is missing."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{missing!r}] = None; {RUN}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr


def test_compiling_for_a_gpu_without_triton_starts_no_compiler(topology_file: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n: > {tmp_path}/started\nexit 1\n")
    compiler.chmod(0o755)
    arguments: list[str | Path] = [
        "compile",
        topology_file,
        "--out",
        "kernels",
        "--target",
        "cpu",
        "--target",
        "cuda:90",
    ]
    variables = {"CXX": str(compiler), "SURGEON_CACHE": str(tmp_path / "cache")}
    assert refusal("triton", *arguments, cwd=tmp_path, **variables) == (
        "surgeon: target cuda:90: expected the Python package triton, got none; "
        "run pip install 'surgeon-compile[gpu]', or leave the target out\n"
    )
    assert {file.name for file in tmp_path.iterdir()} == {"topology.json", "g++"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "arguments", "where", "extra"),
    [
        ("scipy", ["learn", "no-model", *MODEL, "--out", "t.json", "--cuts"], "--cuts", "learn"),
        ("accelerate", ["assess", "no-model", *MODEL, "--device-map", "auto"], "--device-map", "learn"),
        ("gguf", ["assess", "no.gguf", *MODEL], "no.gguf", "gguf"),
        ("accelerate", ["assess", "no.gguf", *MODEL], "no.gguf", "learn"),
        ("matplotlib", ["report", PILOT, TOPOLOGY], "surgeon report", "learn"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    missing: str, arguments: list[str | Path], where: str, extra: str, tmp_path: Path
) -> None:
    line = refusal(missing, *arguments, cwd=tmp_path)
    assert line.startswith(f"surgeon: {where}: expected the Python package {missing}, got none; ")
    assert f"run pip install 'surgeon-compile[{extra}]'" in line
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
