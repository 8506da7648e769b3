"""Peak memory of reading a prompt and some tokens after it, with each way of caching in its own process.

The peak is the operating system's high-water mark of resident memory, which Linux lets a process reset.
"""

import json
import subprocess
import sys
from pathlib import Path

KINDS = ("dense", "patched", "surgeon_cache")
"""The model unpatched, patched, and patched with a SurgeonCache; the first two use a DynamicCache."""


def peak_bytes(kind: str, topology: str, length: int, steps: int, variant: str | None) -> int:
    """Peak bytes beyond what the loaded model takes; its kernels must have been compiled by `whole_model`."""
    arguments = json.dumps([kind, topology, length, steps, variant])
    run = subprocess.run(
        [sys.executable, "-m", "measure.peak_memory", arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(run.stdout)


def main(kind: str, topology: str, length: int, steps: int, variant: str | None) -> None:
    """Runs one kind and prints the bytes."""
    import torch
    from transformers import DynamicCache
    from transformers.utils import logging

    from inputs.checkpoints import SMOLLM2_135M, load_model, model_folder
    from surgeon.compiler.system.cache import cache_folder
    from surgeon.runtime import SurgeonCache, load, patch
    from surgeon.runtime.transformers.cache import CACHE_NAME

    torch.set_num_threads(2)
    logging.disable_progress_bar()
    model = load_model(model_folder(SMOLLM2_135M, cache_folder()))
    package = load(cache_folder() / "kernels" / topology, strict=True, cpu_variant=variant)
    if kind != "dense":
        patch(model, package, recall="pattern")
    tokens = torch.randint(1000, 40000, (1, length + steps), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=tokens[:, :16], logits_to_keep=1)  # reads the weights from their mapped files
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmHWM")
        cache = SurgeonCache(package) if kind == "surgeon_cache" else DynamicCache(config=model.config)
        model(input_ids=tokens[:, :length], logits_to_keep=1, **{CACHE_NAME: cache})
        for step in range(length, length + steps):
            model(input_ids=tokens[:, step : step + 1], **{CACHE_NAME: cache})
    print(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
