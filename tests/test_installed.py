"""The wheel, installed without any extra, as a user meets it: it compiles for a CPU, loads and serves."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models import masked_model, sparse_topology, tiny_llama, tokens
from wheels import build_wheel, clean_environment, install

pytestmark = pytest.mark.slow

SERVE = """
import sys
import torch
from transformers import AutoModelForCausalLM
import surgeon.runtime as surgeon

package, model, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
assert surgeon.patch(model, surgeon.load(package), recall="pattern") == ()
ids = torch.load(out)
with torch.no_grad():
    torch.save(model(ids).logits, out)
print(surgeon.__version__, surgeon.__file__)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's commands. Triton is left out: torch's wheel for CUDA would bring it along."""
    folder = tmp_path_factory.mktemp("installed")
    return install(build_wheel(folder), folder, without=("triton",))


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    file = tmp_path / "topology.json"
    file.write_text(sparse_topology().canonical())
    return file


def run(command: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_it_compiles_for_a_cpu_loads_and_serves(commands: Path, topology_file: Path, tmp_path: Path) -> None:
    compiled = run([commands / "surgeon-compile", topology_file, "--out", "k", "--dtype", "fp32"], tmp_path)
    assert (compiled.returncode, compiled.stderr) == (0, "")
    assert compiled.stdout.startswith("k: 3 kernels for cpu, ")

    model, ids = tiny_llama(), tokens(2, 70)
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "tensor")
    served = run([commands / "python", "-c", SERVE, "k", "model", "tensor"], tmp_path)
    assert served.returncode == 0, served.stderr
    with torch.no_grad():
        expected = masked_model(model, sparse_topology())(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "tensor"), expected, atol=5e-5, rtol=0)

    version, place = served.stdout.split()
    assert Path(place).is_relative_to(commands.parent)
    for command in ("surgeon", "surgeon-compile"):
        assert run([commands / command, "--version"], tmp_path).stdout == f"surgeon-compile {version}\n"


def test_compiling_for_a_gpu_needs_an_extra(commands: Path, topology_file: Path, tmp_path: Path) -> None:
    done = run(
        [commands / "surgeon-compile", topology_file, "--out", "k", "--target", "cpu", "--target", "cuda:90"], tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "surgeon: target cuda:90: expected the Python package triton, got none; "
        "run pip install 'surgeon-compile[gpu]', or leave the target out\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["topology.json"]


def test_it_inspects_and_shows_help(commands: Path, topology_file: Path, tmp_path: Path) -> None:
    assert "density" in run([commands / "surgeon", "inspect", topology_file], tmp_path).stdout
    for name in ("compile", "inspect", "assess", "learn", "pilot", "report", "export", "tune"):
        assert run([commands / "surgeon", name, "--help"], tmp_path).returncode == 0
