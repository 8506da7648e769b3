"""Measures what learning a topology costs a model: CPU time and peak memory, in a process of its own.

    python benchmarks/learning_cost.py                        # SmolLM2-135M
    python benchmarks/learning_cost.py qwen2.5-coder-0.5b-instruct
    python benchmarks/learning_cost.py path/to/another/model

The topology is thrown away; the row goes to results/learning-cost.json. CPU seconds are those of all threads, so that
other work on the machine changes them little. Beside them stand the CPU seconds of one dense prompt of that length.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning-cost.json"
DENSITY, LENGTH, BLOCK = 0.25, 2048, 64
PROMPTS = 3
LEARNER = "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())"
WATCH = """
import atexit, pathlib, sys
peak = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: peak.write_text(pathlib.Path("/proc/self/status").read_text()))
"""
"""Writes down the peak of the process itself; what wait4 tells includes its parent's, before the exec."""
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
"""Threads that wait must sleep, or their waiting counts as CPU time; torch reads this when it is loaded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the row, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure what learning a topology costs a model.")
    parser.add_argument(
        "model",
        nargs="?",
        default="smollm2-135m-instruct",
        help="a model's folder, or what is fetched: smollm2-135m-instruct (the default), qwen2.5-coder-0.5b-instruct",
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    settings = PASSIVE | {"OMP_NUM_THREADS": str(options.threads)}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        given = sys.argv[1:] if arguments is None else arguments
        os.execve(sys.executable, [sys.executable, __file__, *given], os.environ | settings)

    from inputs.checkpoints import CHECKPOINTS, model_folder
    from inputs.texts import learning_texts
    from surgeon.compiler.system.cache import cache_folder

    known = CHECKPOINTS.get(options.model)
    model = model_folder(known, cache_folder(), print) if known else Path(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{name}.txt" for name in ("handbook", "old", "perl")]
        for file, text in zip(files, learning_texts(cache_folder(), print), strict=True):
            file.write_text(text.text, encoding="utf-8")
        row = learning(model, files, ["--density", str(DENSITY), "--length", str(LENGTH), "--block", str(BLOCK)])
    keep(row | prompt(model, LENGTH))
    return 0


def learning(model: Path, texts: Sequence[Path], shape: Sequence[str]) -> dict[str, Any]:
    """Runs `surgeon learn` to its end, and returns its command, its provenance's figures, and its peak in MB.

    Raises:
        SystemExit: it failed, and has said why.
    """
    names = [argument for text in texts for argument in ("--text", text.name)]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "topology.json"
        paths = [argument for text in texts for argument in ("--text", str(text))]
        command = ["learn", str(model), *paths, *shape, "--out", str(out)]
        peak = Path(scratch) / "status"
        status = subprocess.run([sys.executable, "-c", f"{WATCH}\n{LEARNER}", str(peak), *command]).returncode
        if status:
            raise SystemExit(status)
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", peak.read_text(encoding="utf-8"), re.MULTILINE)
        topology = json.loads(out.read_text(encoding="utf-8"))
    provenance = topology["provenance"]
    return {
        "model": provenance["model"],
        "command": " ".join(["surgeon learn", model.name, *names, *shape]),
        "length": topology["block_size"] * topology["num_blocks"],
        "block_size": topology["block_size"],
        "density": provenance["density"],
        "cpu_seconds": provenance["cpu_seconds"],
        "peak_mb": int(kilobytes) * 1024 / 1e6,
    }


def prompt(model: Path, length: int) -> dict[str, Any]:
    """The model's parameters, and the CPU seconds of a dense prompt, the median of some after a first one."""
    import torch
    from transformers import AutoModelForCausalLM

    from measure.timing import machine

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(length)[None] % dense.config.vocab_size
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + PROMPTS):
            started = time.process_time()
            dense(input_ids=ids, logits_to_keep=1)
            seconds.append(time.process_time() - started)
    return {
        "parameters": dense.num_parameters(),
        "prompt_cpu_seconds": statistics.median(seconds[1:]),
        "machine": machine(),
    }


def keep(row: dict[str, Any]) -> None:
    """Writes the row into the results, in place of that model's old one, the smallest model first, and prints it."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = [old for old in rows if old["model"] != row["model"]] + [row]
    rows.sort(key=lambda each: each["parameters"])
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {row[name]}" for name in ("model", "cpu_seconds", "peak_mb", "prompt_cpu_seconds")))


if __name__ == "__main__":
    sys.exit(main())
