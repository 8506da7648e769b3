"""Serves SmolLM2-135M-Instruct with vLLM on a CPU, dense and on compiled kernels, and compares tokens, speed and pages.

vLLM runs in an environment of its own, as a server; this is its client. Run it with `make demo-vllm`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from demo import compiled, continued, on_kernels
from inputs.checkpoints import SMOLLM2_135M, load_model, load_tokenizer, model_folder
from inputs.texts import real_text, windows
from measure.vllm_server import Answer, Server, served
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime import Package
from surgeon.runtime.errors import SurgeonError

TOPOLOGY, LENGTH, NEW_TOKENS = "smollm2-135m-25", 2048, 24
FLAGS = ("--dtype", "float32", "--no-enable-prefix-caching", "--enforce-eager", "--max-model-len", "8192")
ROOT = Path(__file__).parents[1]
LOG = ROOT / "build/demo-vllm.log"

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One server's answers, one after the other and together, and the cache's share in use after a prompt's answer."""

    alone: list[Answer]
    together: list[Answer]
    used: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit status: 1 if the tokens are not those of the patched model."""
    parser = argparse.ArgumentParser(description="Serve SmolLM2 with vLLM, dense and on compiled kernels.")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="of vLLM's environment")
    parser.add_argument("--prompts", type=int, default=4, help="how many of them (default: 4)")
    options = parser.parse_args(arguments)
    try:
        return 0 if run(options.python, options.prompts) else 1
    except SurgeonError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 2


def run(python: Path, count: int) -> bool:
    """Serves, compares and prints; true if all tokens are the expected ones."""
    LOG.parent.mkdir(exist_ok=True)
    folder = model_folder(SMOLLM2_135M, cache_folder(), console.print)
    _, package = compiled(TOPOLOGY)
    texts = windows(load_tokenizer(folder), real_text(cache_folder()), LENGTH, most=count)
    prompts = [[int(token) for token in text[0]] for text in texts]
    kernels: dict[str, object] = {"surgeon_package": str(cache_folder() / "kernels" / TOPOLOGY)}
    settings: dict[str, dict[str, object]] = {
        "dense": {},
        'recall "dense"': kernels | {"surgeon_recall": "dense"},
        'recall "pattern"': kernels | {"surgeon_recall": "pattern"},
    }
    runs, right = {}, {}
    for name, setting in settings.items():
        recall = setting.get("surgeon_recall")
        console.print(f"{name}: generating with Transformers, then serving {len(prompts)} prompts of {LENGTH} tokens")
        expected = continuations(folder, package if recall else None, str(recall), prompts)
        with served(python, folder, setting, LOG, FLAGS) as server:
            runs[name] = measured(server, prompts)
        answers = [answer.tokens for answer in (*runs[name].alone, *runs[name].together)]
        right[name] = sum(answer == wanted for answer, wanted in zip(answers, [*expected, *expected], strict=True))
        console.print(f"{name}: {right[name]} of {2 * len(prompts)} answers are those of Transformers")
    console.print(table_of(runs, right))
    return all(count == 2 * len(prompts) for count in right.values())


@torch.inference_mode()
def continuations(
    folder: Path, package: Package | None, recall: str, prompts: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """The greedy continuations of the Transformers model, patched with the package if there is one."""
    model = load_model(folder)
    of: Any = model if package is None else on_kernels(model, package, recall)
    of.generation_config.eos_token_id = None  # as many tokens from everybody
    return [tuple(continued(of, torch.tensor([prompt]), NEW_TOKENS).tolist()) for prompt in prompts]


def measured(server: Server, prompts: Sequence[Sequence[int]]) -> Run:
    """Asks a server for each prompt alone, after one that warms it up, and for all of them together."""
    server.ask(prompts[0], 2)
    alone = [server.ask(prompt, NEW_TOKENS) for prompt in prompts]
    together = server.ask_together(prompts, NEW_TOKENS)
    return Run(alone, together, server.cache_used_by(prompts[0], 2 * NEW_TOKENS))


def table_of(runs: dict[str, Run], right: dict[str, int]) -> Table:
    """The servers side by side, for the terminal."""
    table = Table(title=f"SmolLM2-135M-Instruct under vLLM, prompts of {LENGTH:,} tokens, fp32")
    for heading in ("", "as Transformers", "first token", "all at once: tokens/s", "cache in use"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, run in runs.items():
        first = sorted(answer.first for answer in run.alone)[len(run.alone) // 2]
        tokens = sum(len(answer.tokens) for answer in run.together) / max(answer.whole for answer in run.together)
        equal = f"{right[name]} of {len(run.alone) + len(run.together)}"
        table.add_row(name, equal, f"{first:.2f} s", f"{tokens:.1f}", f"{run.used:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
