"""The package of a server: which of its layers free pages, and how an error that nobody catches is shown."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from models import Compiled, tiny_config
from surgeon.runtime.vllm.options import Options
from surgeon.runtime.vllm.serving import Serving


def config(pipeline: int = 1, **changes: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=tiny_config(**changes)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline),
    )


def test_a_server_by_the_pattern_frees_pages(compiled: dict[str, Compiled]) -> None:
    serving = Serving(compiled["sparse"].package, Options("kernels", "pattern"))
    groups = [serving.group_of(layer, config()) for layer in range(3)]
    assert [group is not None and layer in group.layers for layer, group in enumerate(groups)] == [True] * 3


@pytest.mark.parametrize(
    ("recall", "changes"),
    [
        ("dense", {}),
        ("pattern", {"pipeline": 2}),
        ("pattern", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_others_keep_them(compiled: dict[str, Compiled], recall: str, changes: dict[str, Any]) -> None:
    assert Serving(compiled["sparse"].package, Options("kernels", recall)).group_of(0, config(**changes)) is None


@pytest.mark.parametrize(
    ("error", "traceback", "shown"),
    [
        (
            "PatchError('here', 'this', 'that\\nand', 'do so')",
            "",
            "surgeon: here: expected this, got that\\nand; do so\n",
        ),
        ("PatchError('here', 'this', 'that', 'do so')", "1", "Traceback"),
        ("ValueError('another')", "", "Traceback"),
    ],
)
def test_only_surgeons_errors_are_one_line(error: str, traceback: str, shown: str) -> None:
    script = (
        "import os\n"
        f"os.environ['SURGEON_TRACEBACK'] = {traceback!r}\n"
        "from surgeon.runtime.errors import PatchError\n"
        "from surgeon.runtime.vllm import serving\n"
        "serving._show_in_one_line()\n"
        f"raise {error}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == shown if shown.endswith("\n") else done.stderr.startswith(shown)
