"""The plugin where there is no vLLM: declared for it, and of no cost."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_it_is_declared_as_a_general_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"surgeon": "surgeon.runtime.vllm:register"}


def test_neither_surgeon_nor_the_entry_point_imports_vllm() -> None:
    script = (
        "import sys\n"
        "sys.modules['vllm'] = None\n"
        "import surgeon.compiler, surgeon.runtime, surgeon.runtime.vllm\n"
        "assert callable(surgeon.runtime.vllm.register)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
