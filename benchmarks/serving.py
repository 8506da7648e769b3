"""Times vLLM's OpenAI server on a CPU, dense and on compiled kernels: first tokens, requests at once, cache in use.

The servers of a dtype run side by side and are asked in turn; the one that is not asked sleeps. vLLM runs in an
environment of its own; this is its client.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from inputs.checkpoints import SMOLLM2_135M, load_tokenizer, model_folder
from inputs.texts import real_text, windows
from measure.timing import machine
from measure.vllm_server import Server, served
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime.errors import SurgeonError

TOPOLOGY, LONGEST = "smollm2-135m-23-answers-8192", 8192
ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
RECALLS = {"dense": None, 'recall "dense"': "dense", 'recall "pattern"': "pattern"}
TOGETHER, NEW_TOKENS = 8, 64
GIGABYTES = 3  # of cache for each server: all requests at once fit

console = Console(highlight=False)


@dataclass(frozen=True)
class Prompts:
    """Prompts alone, each new to the servers, and some that are asked together: their first halves are the same."""

    alone: Sequence[list[int]]
    together: Sequence[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the options say and returns the exit status."""
    parser = argparse.ArgumentParser(description="Time vLLM's server on a CPU, dense and on compiled kernels.")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="of vLLM's environment")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--length", type=int, default=LONGEST, help=f"of the longest prompt (default: {LONGEST})")
    parser.add_argument("--repeats", type=int, choices=range(1, 5), default=3, help="prompts asked alone (default: 3)")
    parser.add_argument("--save", type=Path, help="a JSON file for what was measured")
    options = parser.parse_args(arguments)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # servers that are not asked, and threads that wait, cost no CPU time
    try:
        description, rows = machine(), []
        for dtype in options.dtypes:
            for row in measured(options.python, dtype, options.length, options.repeats):
                console.print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()))
                rows.append(row)
    except SurgeonError as error:
        console.print(f"serving: {error}", style="red", markup=False)
        return 2
    if options.save is not None:
        options.save.write_text(json.dumps({"machine": description, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(python: Path, dtype: str, length: int, repeats: int) -> Iterator[dict[str, object]]:
    """The figures of each server in one dtype."""
    folder = model_folder(SMOLLM2_135M, cache_folder(), console.print)
    topology = read_topology(Path(__file__).parent / "topologies" / f"{TOPOLOGY}.json")
    package = compile_package(
        topology, cache_folder() / "kernels" / f"serving-{dtype}", targets=["cpu"], dtypes=[dtype]
    )
    prompts = prompts_of(folder, min(length, LONGEST) - NEW_TOKENS, repeats)
    (ROOT / "build").mkdir(exist_ok=True)
    flags = ("--dtype", DTYPES[dtype], "--enforce-eager", "--max-model-len", str(LONGEST))
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for number, (name, recall) in enumerate(RECALLS.items()):
            config = {} if recall is None else {"surgeon_package": str(package), "surgeon_recall": recall}
            log = ROOT / f"build/serving-{number}.log"
            servers[name] = stack.enter_context(served(python, folder, config, log, flags, GIGABYTES))
            servers[name].ask(prompts.alone[0][-256:], 2)  # warms it up, and leaves no prefix of a prompt
        yield from _asked(servers, prompts, dtype)


def prompts_of(folder: Path, longest: int, repeats: int) -> Prompts:
    """Prompts of real text; those for all at once are of a quarter of the longest one's tokens and more."""
    half = longest // 2
    texts = windows(load_tokenizer(folder), real_text(cache_folder()), half, most=2 * repeats + TOGETHER + 1)
    shared, *rest = ([int(token) for token in text[0]] for text in texts)
    alone, own = rest[: 2 * repeats], rest[2 * repeats :]
    lengths = [longest * (TOGETHER - 1 + 3 * index) // (4 * (TOGETHER - 1)) for index in range(TOGETHER)]
    return Prompts(
        [first + second for first, second in zip(alone[::2], alone[1::2], strict=True)],
        [shared[: size // 2] + text[: size // 2] for size, text in zip(lengths, own, strict=True)],
    )


def _asked(servers: Mapping[str, Server], prompts: Prompts, dtype: str) -> Iterator[dict[str, object]]:
    """Asks the servers in turn, in another order each time."""
    alone: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    order = list(servers.items())
    for prompt in prompts.alone:
        order.append(order.pop(0))
        for name, server in order:
            started = server.cpu_seconds()
            answer = server.ask(prompt, 1)
            alone[name].append((answer.first, server.cpu_seconds() - started))
    for name, server in servers.items():
        started = server.cpu_seconds()
        answers = server.ask_together(prompts.together, NEW_TOKENS)
        spent = server.cpu_seconds() - started
        whole = max(answer.whole for answer in answers)
        firsts, seconds = zip(*alone[name], strict=True)
        yield {
            "dtype": dtype,
            "server": name,
            "topology": TOPOLOGY,
            "prompt": len(prompts.alone[0]),
            "first_s": statistics.median(firsts),
            "first_min_s": min(firsts),
            "first_cpu_s": statistics.median(seconds),
            "first_cpu_min_s": min(seconds),
            "requests": len(answers),
            "requests_tokens": sum(len(prompt) + NEW_TOKENS for prompt in prompts.together),
            "requests_first_s": statistics.fmean(answer.first for answer in answers),
            "requests_s": whole,
            "requests_cpu_s": spent,
            "new_tokens_per_s": NEW_TOKENS * len(answers) / whole,
            "cache_used": server.cache_used_by(prompts.alone[0], NEW_TOKENS),
        }


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
