"""Compiles a topology, patches SmolLM2-135M-Instruct with it and compares it with the dense model on real text.

Last it hides numbers in long prompts and asks both for them, and also a model that follows the pattern alone.

Everything it fetches and compiles is cached, so that a second run needs no network. Run it with `make demo`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inputs.checkpoints import SMOLLM2_135M, load_model, load_tokenizer, model_folder
from inputs.texts import Text, real_text, windows
from measure.quality import explicit_mask
from measure.timing import interleaved, machine
from surgeon.compiler import Topology, compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.compiler.system.terminal import progress_bar
from surgeon.runtime import Package, fingerprint, load, patch, trace
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.evaluate.continuation import compare_continued
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.evaluate.tasks.numbers import single_numbers
from surgeon.runtime.evaluate.tasks.prompts import make_prompts

TOPOLOGIES = Path(__file__).parent / "topologies"
LEARNED = {2048: "smollm2-135m-25-answers", 4096: "smollm2-135m-24-answers-4096"}
"""The topology that was learned or scaled for each length."""
STEP = 64  # tokens of a continuation that are read at once
TOKENS_SCORED = 8192
REPEATS = 3
NEW_TOKENS = 48
TREE_TOKENS = 1000
HIDDEN = 3

console = Console(highlight=False)


@dataclass(frozen=True)
class Comparison:
    """The dense and the patched model at one length: density in blocks, median prefill seconds, perplexities.

    The perplexities are those of the last tokens, which follow a prompt.
    """

    length: int
    density: float
    dense_seconds: float
    patched_seconds: float
    dense_perplexity: float
    patched_perplexity: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare SmolLM2 on compiled kernels with the dense model.")
    parser.add_argument("--save", type=Path, help="write the comparison to this JSON file as well")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    try:
        results = run()
    except SurgeonError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 2
    if options.save:
        rows = [asdict(result) for result in results]
        options.save.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def run() -> list[Comparison]:
    """Fetches, compiles, compares and prints."""
    folder = model_folder(SMOLLM2_135M, cache_folder(), say)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    text = real_text(cache_folder(), say)
    compiled_for = {length: compiled(name) for length, name in LEARNED.items()}
    here = machine()
    say(f"{here['processor']} ({here['torch_isa']}), {here['threads']} threads, torch {here['torch']}, fp32")
    say(f"text: {text.name}, {len(text.text):,} characters, SHA-256 {text.sha256[:12]}")
    before = fingerprint(model)

    results = [compare(model, tokenizer, text, *compiled_for[length], length) for length in LEARNED]
    console.print(comparison_table(results))
    package = compiled_for[min(LEARNED)][1]
    show_continuations(model, tokenizer, text, package)
    check_trees(model, tokenizer, text)
    show_hidden_numbers(model, tokenizer, text, package)

    after = fingerprint(model)
    same = "unchanged" if after == before else f"CHANGED to {after}"
    console.print(f"\nSHA-256 of the weights: {before}, {same}")
    return results


def compiled(name: str) -> tuple[Topology, Package]:
    """The topology of this name and its package, compiled into the cache and loaded."""
    topology = read_topology(TOPOLOGIES / f"{name}.json")
    started = time.perf_counter()
    with progress_bar() as progress:
        path = compile_package(
            topology, cache_folder() / "kernels" / name, targets=["cpu"], dtypes=["fp32"], progress=progress
        )
    built = time.perf_counter()
    package = load(path, strict=True)
    loaded = time.perf_counter()
    say(f"compiled {name}.json in {built - started:.1f} s, loaded its package in {1000 * (loaded - built):.0f} ms")
    return topology, package


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    topology: Topology,
    package: Package,
    length: int,
) -> Comparison:
    """Scores and times the model at one length, dense and patched, on the same tokens."""
    sequences = windows(tokenizer, text, length, most=TOKENS_SCORED // length)
    patched = on_kernels(model, package)
    say(f"{length:,} tokens: perplexity of what follows the prompts of {len(sequences)} sequences")
    (quality,) = compare_continued((model, patched), sequences, STEP)
    say(f"{length:,} tokens: timing {REPEATS} prefills of each, in turn, after a warm-up")
    times = interleaved(
        {"dense": lambda: prefill(model, sequences[0]), "patched": lambda: prefill(patched, sequences[0])}, REPEATS
    )
    num_blocks = -(-length // topology.block_size)
    densities = [topology.density(layer, num_blocks).mean() for layer in range(len(topology.layers))]
    return Comparison(
        length=length,
        density=statistics.fmean(densities),
        dense_seconds=times["dense"].median,
        patched_seconds=times["patched"].median,
        dense_perplexity=quality.continuation.dense_perplexity.value,
        patched_perplexity=quality.continuation.patched_perplexity.value,
    )


def on_kernels(model: PreTrainedModel, package: Package, recall: str = "dense") -> PreTrainedModel:
    """A model with the same weights on a package's kernels."""
    other = twin(model)
    patch(other, package, recall=recall)
    return other


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Fills a new cache with the tokens and computes the logits of the last one."""
    model(input_ids=tokens, logits_to_keep=1)


def comparison_table(results: list[Comparison]) -> Table:
    """The results as a table for the terminal."""
    table = Table(title="SmolLM2-135M-Instruct: dense (sdpa) and patched, same weights and tokens")
    for group, heading in (
        ("", "tokens"),
        ("", "density"),
        ("prefill", "dense"),
        ("prefill", "patched"),
        ("", "faster"),
        ("perplexity after it", "dense"),
        ("perplexity after it", "patched"),
    ):
        table.add_column(f"{group}\n{heading}", justify="right")
    for result in results:
        table.add_row(
            f"{result.length:,}",
            f"{result.density:.1%}",
            f"{result.dense_seconds:.2f} s",
            f"{result.patched_seconds:.2f} s",
            f"{result.dense_seconds / result.patched_seconds:.2f}x",
            f"{result.dense_perplexity:.3f}",
            f"{result.patched_perplexity:.3f}",
        )
    return table


def show_continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, package: Package
) -> None:
    """Prints the greedy continuations by both models of the same long prompt."""
    prompt = windows(tokenizer, text, min(LEARNED), most=3)[-1]
    say(f"continuing a prompt of {prompt.shape[1]:,} tokens by {NEW_TOKENS}")
    console.print()
    for name, line in (
        ("prompt", "… " + words(tokenizer, prompt[0, -40:])),
        ("dense", words(tokenizer, continued(model, prompt, NEW_TOKENS))),
        ("patched", words(tokenizer, continued(on_kernels(model, package), prompt, NEW_TOKENS))),
    ):
        console.print(f"{name:>8}  {line}", markup=False)


def continued(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that greedily follow a prompt `[1, length]`."""
    generate: Any = model.generate
    found = generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    after: torch.Tensor = found[0, prompt.shape[1] :]
    return after


def words(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> str:
    """The tokens as text on one line."""
    return " ".join(str(tokenizer.decode(tokens)).split())


@torch.inference_mode()
def check_trees(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
    """Compares the kernels of a topology full of trees with the model under explicit masks, patched and traced."""
    topology, package = compiled("smollm2-135m-trees")
    (tokens,) = windows(tokenizer, text, TREE_TOKENS, most=1)
    with explicit_mask(model, topology):
        expected = model(input_ids=tokens).logits
    through_patch = on_kernels(model, package, recall="pattern")(input_ids=tokens).logits
    through_trace = trace(model, package, recall="pattern")(tokens)
    size = expected.abs().max()
    console.print(f"\nTrees against explicit masks, {TREE_TOKENS:,} tokens: largest difference of the logits")
    for name, logits in (("patched", through_patch), ("traced", through_trace)):
        console.print(f"{name:>8}  {(logits - expected).abs().max():.1e} where they are up to {size:.0f}")


def show_hidden_numbers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, package: Package
) -> None:
    """Prints the answers about a number in the first half of a prompt: dense, patched, and by the pattern alone."""
    length = min(LEARNED)
    fillers = windows(tokenizer, text, length, most=HIDDEN)
    say(f"asking for numbers hidden in the first half of {length:,} tokens")
    models = {
        "dense": model,
        "patched": on_kernels(model, package),
        "pattern alone": on_kernels(model, package, recall="pattern"),
    }
    table = Table(title=f"A number hidden in the first half of a prompt of {length:,} tokens")
    for heading in ("hidden", *models):
        table.add_column(heading, justify="right")
    for prompt in make_prompts(tokenizer, fillers, (length,), 1, plans=single_numbers):
        (question,) = prompt.questions
        if question.query.depth is not None and question.query.depth <= 0.5:
            ids = torch.cat([prompt.text, question.tokens])[None]
            answers = [words(tokenizer, continued(each, ids, question.budget)) for each in models.values()]
            table.add_row(*question.query.expected, *answers)
    console.print(table)


def say(line: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    console.print(f"[{time.perf_counter() - _STARTED:6.1f} s] {line}", style="dim", markup=False)


_STARTED = time.perf_counter()

if __name__ == "__main__":
    sys.exit(main())
