"""Pilots SmolLM2-135M's topologies of 2,048 tokens on held-out text and shows them on one page: make pilot.

Those of other models and lengths are piloted if they are named.

Each is compiled and given to `surgeon pilot`, in its own process since memory is measured, which writes
results/pilot-*.json. Then `surgeon report` draws the sparsest one, with the others beside it, into build/pilot.html.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from inputs.checkpoints import QWEN_CODER_05B, SMOLLM2_135M, Checkpoint, model_folder
from inputs.texts import held_out_texts
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.evaluate.tasks.every import TASKS

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
TOPOLOGIES = ("smollm2-135m-10-answers", "smollm2-135m-15-answers", "smollm2-135m-25-answers")
"""The names of the topologies, the sparsest first: the page is about it."""
MEASURED = ("--sequences", "6", "--tasks", "6", "--rounds", "6")
MEASURED_LARGER = ("--sequences", "2", "--tasks", "6", "--rounds", "3", "--no-window", "--no-pattern")
"""A larger model's, which takes ten times as long."""
MEASURED_LONG = ("--sequences", "1", "--tasks", "1", "--rounds", "1", "--no-window", "--no-pattern")
"""Beyond 8,192 tokens, where a dense prompt of a larger model takes minutes: hardly more than a first look."""
THRESHOLDS = ("--min-speedup", "1")
"""Beside those of retrieval and of the continuation, which `surgeon pilot` sets by itself."""
SURGEON = "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())"

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pilots, writes the page, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Pilot two models' topologies on held-out text.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for the pilots' findings")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32; bf16 is faster on processors with AMX"
    )
    parser.add_argument("--length", type=int, metavar="TOKENS", help="default: each topology's own")
    parser.add_argument("--ask", action="append", choices=TASKS, metavar="TASK", help="repeatable; default: all tasks")
    page = FOLDER.parent / "build" / "pilot.html"
    parser.add_argument("--report", type=Path, default=page, metavar="FILE", help="the page")
    options = parser.parse_args(arguments)
    names = options.names or TOPOLOGIES
    options.report.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        pilots = run_pilots(options.results, names, options.dtype, options.length, options.ask or TASKS)
    except SurgeonError as error:
        console.print(f"pilot: {error}", style="red", markup=False)
        return 2
    first, *others = pilots
    beside = [argument for other in others for argument in ("--beside", str(other))]
    surgeon("report", str(first), str(topology_file(names[0])), *beside, "--out", str(options.report))
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


def run_pilots(
    results: Path, names: Sequence[str], dtype: str, length: int | None = None, asked: Sequence[str] = TASKS
) -> list[Path]:
    """Compiles the topologies, pilots them at their own length or this one, and returns the pilots' files.

    Raises:
        ModelError: the model or a text cannot be downloaded.
    """
    cache = cache_folder()
    work = cache / "pilots"  # so that an interrupted run goes on, and the dense model is asked a task once
    kept = ("--work", str(work))
    pilots = []
    chosen = [argument for task in asked for argument in ("--ask", task)]
    chosen += [] if length is None else ["--length", str(length)]
    with tempfile.TemporaryDirectory() as scratch:
        texts = [Path(scratch) / name for name in ("handbook-last-quarter.txt", "new-testament.txt")]
        for file, text in zip(texts, held_out_texts(cache, console.print), strict=True):
            file.write_text(text.text, encoding="utf-8")
        held_out = [argument for file in texts for argument in ("--text", str(file))]
        for name in names:
            checkpoint = checkpoint_of(name)
            model = model_folder(checkpoint, cache, console.print)
            topology = read_topology(topology_file(name))
            measured = (*measured_of(checkpoint, length or topology.num_blocks * topology.block_size), *chosen)
            package = compile_package(topology, cache / "kernels" / name, targets=["cpu"], dtypes=[dtype])
            out = results / (f"pilot-{name}.json" if length is None else f"pilot-{name}-at-{length}.json")
            surgeon("pilot", str(model), str(package), *held_out, *measured, *THRESHOLDS, *kept, "--out", str(out))
            pilots.append(out)
    shutil.rmtree(work, ignore_errors=True)  # not for the next run: the code may be another
    return pilots


def checkpoint_of(name: str) -> Checkpoint:
    """The model that a topology is for."""
    return QWEN_CODER_05B if name.startswith(QWEN_CODER_05B.title.lower()) else SMOLLM2_135M


def measured_of(checkpoint: Checkpoint, length: int) -> tuple[str, ...]:
    """How much of a model is measured at this length, as options of `surgeon pilot`."""
    if checkpoint == SMOLLM2_135M:
        return MEASURED
    return MEASURED_LARGER if length <= 8192 else MEASURED_LONG


def topology_file(name: str) -> Path:
    """The path of a committed topology."""
    return FOLDER / "topologies" / f"{name}.json"


def surgeon(*arguments: str) -> None:
    """Runs a Surgeon command; if it fails, it says why, and this process exits with its status."""
    status = subprocess.run([sys.executable, "-c", SURGEON, *arguments], check=False).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())
