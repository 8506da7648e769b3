"""Learns topologies of SmolLM2-135M and Qwen2.5-Coder-0.5B and scores them on held-out text.

Nothing was learned, validated or chosen on that text.

    python benchmarks/learn.py                            # all of them
    python benchmarks/learn.py smollm2-135m-25 --again    # one of them, anew: make learn-demo

The topologies go to topologies/, the scores to results/, one row each: learn.json has those that were learned for text,
scored on whole sequences by the pattern alone; answers.json those that were learned for answers, scored on the last 256
tokens of each sequence with recall "dense". A topology that exists is scored but
not learned again, except with --again. The steps of learning are kept in the cache, so that a stopped run can continue.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel

from inputs.checkpoints import QWEN_CODER_05B, SMOLLM2_135M, Checkpoint, load_model, load_tokenizer, model_folder
from inputs.texts import held_out_texts, learning_texts, windows
from measure.timing import machine
from surgeon.compiler import Topology, compile_package, read_topology
from surgeon.compiler.cli.main import main as surgeon
from surgeon.compiler.learn.measure.checkpoint import model_shape
from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.learn.patterns.to_topology import pattern_topology
from surgeon.compiler.learn.patterns.windows import uniform_windows
from surgeon.compiler.system.cache import cache_folder
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime import load, patch, unpatch
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.evaluate.comparison import Comparison, compare
from surgeon.runtime.evaluate.continuation import compare_continued
from surgeon.runtime.evaluate.pilot.run import twin

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "learn.json"
ANSWERS = FOLDER / "results" / "answers.json"
TOKENS_SCORED = 6 * 2048  # per text
SINK = 1
STEP = 64  # tokens of a continuation that are read at once; at most the dense rows, so that all of them ask

console = Console(highlight=False)


@dataclass(frozen=True)
class Case:
    """A topology to learn: visible share of block pairs, tokens per sequence and per block.

    Its name has the share that it reached, in percent: scaling windows to another length changes the share. It is
    learned on sequences of `measured_length` tokens. `way` holds further arguments of `surgeon learn`, the alternatives
    to its defaults. `sequences` are scored in each text, or as many as have `TOKENS_SCORED` tokens.
    """

    name: str
    density: float
    length: int
    block: int
    measured_length: int
    way: tuple[str, ...] = ("--for", "text")
    checkpoint: Checkpoint = SMOLLM2_135M
    sequences: int = 0

    @property
    def results(self) -> Path:
        """The file of its score."""
        return ANSWERS if self.for_answers else RESULTS

    @property
    def for_answers(self) -> bool:
        """True if it is learned for answers, the default, and scored with recall "dense"."""
        return not {"text", "ultrametric"} & set(self.way)


CASES = (
    Case("smollm2-135m-50", 0.5, 2048, 64, 2048),
    Case("smollm2-135m-35", 0.35, 2048, 64, 2048),
    Case("smollm2-135m-25", 0.25, 2048, 64, 2048),
    Case("smollm2-135m-15", 0.15, 2048, 32, 2048),
    Case("smollm2-135m-22-4096", 0.25, 4096, 64, 2048),
    Case("smollm2-135m-21-8192", 0.25, 8192, 64, 2048),
    Case("smollm2-135m-25-cuts", 0.25, 2048, 64, 2048, ("--for", "text", "--cuts")),
    Case("smollm2-135m-25-ultrametric", 0.25, 2048, 64, 2048, ("--method", "ultrametric")),
    Case("smollm2-135m-50-answers", 0.5, 2048, 32, 2048, ()),
    Case("smollm2-135m-25-answers", 0.25, 2048, 32, 2048, ()),
    Case("smollm2-135m-15-answers", 0.15, 2048, 32, 2048, ()),
    Case("smollm2-135m-10-answers", 0.1, 2048, 16, 2048, ()),
    Case("smollm2-135m-10-answers-blocks-of-32", 0.1, 2048, 32, 2048, ()),
    Case("smollm2-135m-6-answers", 0.06, 2048, 16, 2048, ()),
    Case("smollm2-135m-25-answers-cuts", 0.25, 2048, 32, 2048, ("--cuts",)),
    Case("smollm2-135m-24-answers-4096", 0.25, 4096, 32, 2048, ()),
    Case("smollm2-135m-24-answers-4096-blocks-of-16", 0.25, 4096, 16, 2048, ()),
    Case("smollm2-135m-23-answers-8192", 0.25, 8192, 32, 2048, ()),
    Case("smollm2-135m-24-answers-8192", 0.25, 8192, 16, 2048, ()),
    Case("smollm2-135m-9-answers-8192", 0.1, 8192, 16, 2048, ()),
    Case("smollm2-135m-8-answers-8192", 0.1, 8192, 32, 2048, ()),
    Case("qwen2.5-coder-0.5b-22-answers-4096", 0.25, 4096, 64, 2048, (), QWEN_CODER_05B, 2),
    Case("qwen2.5-coder-0.5b-12-answers-4096", 0.125, 4096, 16, 2048, (), QWEN_CODER_05B, 2),
    Case("qwen2.5-coder-0.5b-11-answers-8192", 0.125, 8192, 16, 2048, (), QWEN_CODER_05B, 1),
    *(
        Case(name, density, length, block, 2048, ("--windows", f"{windows}.json"), QWEN_CODER_05B, 1)
        for name, density, length, block, windows in (
            ("qwen2.5-coder-0.5b-21-answers-8192", 0.25, 8192, 64, "qwen2.5-coder-0.5b-22-answers-4096"),
            ("qwen2.5-coder-0.5b-11-answers-16384", 0.125, 16384, 16, "qwen2.5-coder-0.5b-11-answers-8192"),
        )
    ),
    *(
        Case(
            f"smollm2-135m-{percent}-converted",
            percent / 100,
            2048,
            block,
            2048,
            ("--for", "text", "--route", "convert", "--near", "128", "--windows", f"smollm2-135m-{percent}.json"),
        )
        for percent, block in ((25, 64), (15, 32))
    ),
    *(
        Case(
            f"smollm2-135m-25-routed{suffix}",
            0.25,
            length,
            32,
            2048,
            ("--for", "text", "--retrieve", "--near", "128", "--windows", "smollm2-135m-15.json"),
        )
        for suffix, length in (("", 2048), ("-4096", 4096), ("-8192", 8192))
    ),
    Case("qwen2.5-coder-0.5b-12-4096", 0.125, 4096, 16, 2048, ("--for", "text"), QWEN_CODER_05B, 2),
    Case("qwen2.5-coder-0.5b-11-8192", 0.125, 8192, 16, 2048, ("--for", "text"), QWEN_CODER_05B, 1),
    *(
        Case(
            f"qwen2.5-coder-0.5b-12-routed-{length}",
            0.125,
            length,
            16,
            2048,
            (
                "--for",
                "text",
                "--retrieve",
                "--near",
                "128",
                "--windows",
                f"qwen2.5-coder-0.5b-{percent}-{length}.json",
            ),
            QWEN_CODER_05B,
            sequences,
        )
        for length, percent, sequences in ((4096, 12, 2), (8192, 11, 1))
    ),
)


@dataclass(frozen=True)
class Score:
    """A text's means over its sequences.

    `relative` is the divergence over that of equal windows at equal density, `relative_error` the standard error of its
    mean over the sequences.
    """

    text: str
    sequences: int
    dense_perplexity: float
    perplexity: float
    ratio: float
    divergence: float
    windows_divergence: float
    relative: float
    relative_error: float | None
    same_first: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Learns and scores the topologies and returns the exit status."""
    parser = argparse.ArgumentParser(description="Learn topologies for two models and score them on held-out text.")
    names = [case.name for case in CASES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--again", action="store_true", help="learn topologies again that exist already")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"expected names of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    try:
        for case in CASES:
            if not options.names or case.name in options.names:
                topology, command = learned(case, options.again)
                keep(case, topology, command, score(case, topology))
    except SurgeonError as error:
        console.print(f"learn: {error}", style="red", markup=False)
        return 2
    return 0


def learned(case: Case, again: bool) -> tuple[Topology, str]:
    """The case's topology, made by `surgeon learn` if it does not exist, and the command that makes it."""
    shape = ["--density", str(case.density), "--length", str(case.length), "--block", str(case.block)]
    if case.measured_length != case.length:
        shape += ["--measured-length", str(case.measured_length)]
    shape += case.way
    out = FOLDER / "topologies" / f"{case.name}.json"
    names = [f"{name}.txt" for name in ("handbook", "old", "perl")]
    if again or not out.exists():
        folder = model_folder(case.checkpoint, cache_folder(), console.print)
        work = cache_folder() / "learning"
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / name for name in names]
            for file, text in zip(files, learning_texts(cache_folder(), console.print), strict=True):
                file.write_text(text.text, encoding="utf-8")
            paths = [argument for file in files for argument in ("--text", str(file))]
            given = [str(out.with_name(part)) if part.endswith(".json") else part for part in shape]
            if surgeon(["learn", str(folder), *paths, *given, "--out", str(out), "--work", str(work)]):
                raise SystemExit(2)
    texts = [argument for name in names for argument in ("--text", name)]
    return read_topology(out), " ".join(["surgeon learn", case.checkpoint.name, *texts, *shape, "--out", out.name])


@functools.cache
def model(checkpoint: Checkpoint, _role: Literal["dense", "patched", "windows"]) -> PreTrainedModel:
    """The model that stays dense, or one that is patched and unpatched: they have their weights in common."""
    if _role == "dense":
        return load_model(model_folder(checkpoint, cache_folder(), console.print))
    return twin(model(checkpoint, "dense"))


def held_out(case: Case) -> tuple[tuple[str, list[torch.Tensor]], ...]:
    """The held-out texts' names, and their sequences `[1, length]`."""
    tokenizer = load_tokenizer(model_folder(case.checkpoint, cache_folder()))
    most = case.sequences or TOKENS_SCORED // case.length
    texts = held_out_texts(cache_folder(), console.print)
    return tuple((text.name, windows(tokenizer, text, case.length, most)) for text in texts)


def score(case: Case, topology: Topology) -> list[Score]:
    """Scores a topology against equal windows of its own density, both on compiled kernels."""
    shape = model_shape(model(case.checkpoint, "dense"))
    equal = uniform_windows(
        shape.num_hidden_layers, shape.num_attention_heads, topology.num_blocks, SINK, mean_density(topology)
    )
    grid = Grid(topology.block_size, topology.num_blocks, SINK, case.density)
    baseline = pattern_topology(shape, grid, Pattern(equal), {})
    recall = "dense" if case.for_answers else "pattern"
    models = [model(case.checkpoint, "dense")]
    for role, which in (("patched", topology), ("windows", baseline)):
        name = case.name if role == "patched" else f"{case.name}-windows"
        out = compile_package(which, cache_folder() / "kernels" / name, targets=["cpu"], dtypes=["fp32"])
        models.append(model(case.checkpoint, role))
        patch(models[-1], load(out, strict=True), recall=recall)
    try:
        return [scored(name, *compared(models, sequences, recall)) for name, sequences in held_out(case)]
    finally:
        for patched in models[1:]:
            unpatch(patched)


def compared(models: Sequence[PreTrainedModel], sequences: Sequence[torch.Tensor], recall: str) -> list[Comparison]:
    """Compares models with the first one, the dense one.

    By the pattern alone whole sequences count; with recall "dense" their ends, whose tokens ask as those of an answer
    do.
    """
    if recall == "pattern":
        dense, *others = models
        return [compare(dense, other, sequences) for other in others]
    return [found.continuation for found in compare_continued(models, sequences, STEP)]


def scored(name: str, ours: Comparison, theirs: Comparison) -> Score:
    """A text's score, from comparing the learned topology and equal windows with the dense model."""
    relative = [one.divergence / other.divergence for one, other in zip(ours.sequences, theirs.sequences, strict=True)]
    return Score(
        text=name,
        sequences=len(relative),
        dense_perplexity=ours.dense_perplexity.value,
        perplexity=ours.patched_perplexity.value,
        ratio=ours.perplexity_ratio.value,
        divergence=ours.divergence.value,
        windows_divergence=theirs.divergence.value,
        relative=ours.divergence.value / theirs.divergence.value,
        relative_error=statistics.stdev(relative) / math.sqrt(len(relative)) if len(relative) > 1 else None,
        same_first=ours.agreement.value,
    )


def keep(case: Case, topology: Topology, command: str, scores: list[Score]) -> None:
    """Writes the case's row into the results, in the order of the cases, and prints it."""
    row: dict[str, Any] = {
        "topology": case.name,
        "model": case.checkpoint.name,
        "command": command,
        "method": topology.provenance["method"],
        "heads_with_a_cut": topology.provenance["heads_with_a_cut"],
        "density": mean_density(topology),
        "length": case.length,
        "block_size": topology.block_size,
        "learning_cpu_seconds": topology.provenance["cpu_seconds"],
        "ratio": statistics.fmean(found.ratio for found in scores),
        "relative": statistics.fmean(found.relative for found in scores),
        "worst_relative": max(found.relative for found in scores),
        "texts": [asdict(found) for found in scores],
        "machine": machine(),
    }
    file = case.results
    rows = {old["topology"]: old for old in json.loads(file.read_text("utf-8"))["rows"]} if file.exists() else {}
    rows[case.name] = row
    ordered = [rows[known.name] for known in CASES if known.name in rows]
    file.write_text(json.dumps({"rows": ordered}, indent=1) + "\n", encoding="utf-8")
    for found in scores:
        console.print(
            f"{case.name}, {found.text}: perplexity {found.dense_perplexity:.2f} dense, {found.perplexity:.2f}"
            f" ({found.ratio:.3f}x); divergence {found.divergence:.4f}, {found.relative:.2f} of equal windows'"
        )


if __name__ == "__main__":
    sys.exit(main())
