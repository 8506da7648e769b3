"""The script that runs a command in a source tree that is not installed, as on the first machine with a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIBRARIES = Path(torch.__file__).parents[1]


def from_source(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python without its site module, so without any installation of surgeon, from an empty environment."""
    return subprocess.run(
        [ROOT / "benchmarks" / "from_source", sys.executable, "-S", *command],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(LIBRARIES), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_surgeon_is_that_of_the_tree(tmp_path: Path) -> None:
    script = (
        "import surgeon.compiler, surgeon.runtime, surgeon.compiler.system.jinja as templates\n"
        "print(surgeon.compiler.__file__, surgeon.runtime.__file__)\n"
        "templates.render_template('cpu/vectors.h.jinja')\n"
    )
    done = from_source("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    links = ROOT / ".ci" / "types" / "surgeon"
    assert done.stdout == f"{links}/compiler/__init__.py {links}/runtime/__init__.py\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_the_gpu_suite_and_the_benchmark_run_as_far_as_they_can(tmp_path: Path) -> None:
    done = from_source(ROOT / "benchmarks" / "gpu.py", "--packages", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu.py: expected a GPU that torch can use, got none; pass --compile to prepare for one\n"

    suite = "tests/runtime/kernels/gpu/test_on_a_gpu.py"
    done = from_source("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", suite, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout.splitlines()[-1]
    assert "needs a GPU" in done.stdout
