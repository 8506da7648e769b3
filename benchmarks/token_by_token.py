"""Asks heads that choose blocks the same questions twice: read in one call, and token by token.

    python benchmarks/token_by_token.py                      # every topology with routes and a pilot
    python benchmarks/token_by_token.py smollm2-135m-25-routed

In one call the rows of a tile choose together; token by token every row chooses for itself, as in decoding. The
questions are those of the topology's pilot that are turns of their own after the text. Rows go to
results/token-by-token.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from committed import RESULTS, TOPOLOGIES
from inputs.checkpoints import load_model, load_tokenizer, model_folder
from inputs.texts import held_out_texts
from measure.timing import machine
from pilot import checkpoint_of, measured_of
from surgeon.compiler import Topology, compile_package, read_topology
from surgeon.compiler.learn.routing.routed import routed_heads
from surgeon.compiler.learn.texts.text import read_text, spread
from surgeon.compiler.system.cache import cache_folder
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime import load, patch
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.evaluate.answers import score_later
from surgeon.runtime.evaluate.tasks.numbers import KEYS, SINGLE
from surgeon.runtime.evaluate.tasks.prompts import Prompt, fitting_lengths, make_prompts

TASKS = (SINGLE, KEYS)

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Asks, writes the rows, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Ask routed heads questions in one call and token by token.")
    known = {file.stem: topology for file in sorted(TOPOLOGIES.glob("*.json")) if (topology := _piloted(file))}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--results", type=Path, default=RESULTS / "token-by-token.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(known):
        parser.error(f"expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    try:
        for name in options.names or known:
            row = asked(name, known[name])
            keep(options.results, row)
            console.print(f"{name}: {row['tasks']}", markup=False)
    except SurgeonError as error:
        console.print(f"token_by_token: {error}", style="red", markup=False)
        return 2
    return 0


def asked(name: str, topology: Topology) -> dict[str, Any]:
    """The row of a topology: for each task the number of questions, and those answered after either way of reading."""
    checkpoint = checkpoint_of(name)
    folder = model_folder(checkpoint, cache_folder(), console.print)
    package = compile_package(topology, cache_folder() / "kernels" / name, targets=["cpu"], dtypes=["fp32"])
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    patch(model, load(package, strict=True), recall="pattern")
    length = topology.num_blocks * topology.block_size
    settings = measured_of(checkpoint, length)
    count, rounds = (int(settings[settings.index(option) + 1]) for option in ("--sequences", "--tasks"))
    lengths = fitting_lengths(tokenizer, length, TASKS)
    prompts = make_prompts(tokenizer, _fillers(tokenizer, length, count), lengths, rounds, tasks=TASKS)
    return {
        "topology": name,
        "topology_sha256": topology.sha256,
        "model": checkpoint.name,
        "density": mean_density(topology),
        "lengths": lengths,
        "dtype": "fp32",
        "tasks": both_ways(model, tokenizer, [prompt for prompt in prompts if not prompt.at_end]),
        "machine": machine(),
    }


@torch.inference_mode()
def both_ways(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """The scores of each task's questions, summed: `in_one_call`, and `by_token`; and of how many `questions`."""
    found: dict[str, dict[str, float]] = {}
    for index, prompt in enumerate(prompts):
        console.print(f"prompt {index + 1} of {len(prompts)}", style="dim")
        read = model(input_ids=prompt.text[None], use_cache=True, logits_to_keep=1).past_key_values
        for question in prompt.questions:
            sums = found.setdefault(question.query.task, {"questions": 0, "in_one_call": 0.0, "by_token": 0.0})
            sums["questions"] += 1
            sums["in_one_call"] += score_later(model, tokenizer, question, read)
            sums["by_token"] += score_later(model, tokenizer, question, read, by_token=True)
    return found


def keep(file: Path, row: Mapping[str, Any]) -> None:
    """Writes the row into the results, in place of that topology's old one, in the order of names."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = [old for old in rows if old["topology"] != row["topology"]] + [row]
    rows.sort(key=lambda each: str(each["topology"]))
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _piloted(file: Path) -> Topology | None:
    """A topology, if heads of it choose blocks and a pilot of it lies here."""
    if not (RESULTS / f"pilot-{file.stem}.json").exists():
        return None
    topology = read_topology(file)
    return topology if routed_heads(topology) else None


def _fillers(tokenizer: Any, length: int, count: int) -> list[torch.Tensor]:
    """The sequences that a pilot of this length takes from the texts."""
    with tempfile.TemporaryDirectory() as scratch:
        taken: list[torch.Tensor] = []
        for index, text in enumerate(held_out_texts(cache_folder(), console.print)):
            file = Path(scratch) / f"{index}.txt"
            file.write_text(text.text, encoding="utf-8")
            taken += spread(read_text(file, tokenizer), length, count)
    return taken


if __name__ == "__main__":
    sys.exit(main())
