"""Times SmolLM2-135M in the engines of others and in ours: first token and tokens a second, each in its own process.

All of them continue the same prompts, which hide a number and ask for it, in turn. Run it with `make peers`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inputs.checkpoints import SMOLLM2_135M, gguf_file, load_tokenizer, model_folder
from inputs.texts import real_text, windows
from measure.timing import machine
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime.errors import ModelError, SurgeonError
from surgeon.runtime.evaluate.tasks.numbers import DEPTHS, single_numbers
from surgeon.runtime.evaluate.tasks.prompts import make_prompts
from workers.figures import RESULTS, peers_table
from workers.process import Worker
from workers.roster import FOR_ANSWERS, Peer, roster
from workers.rounds import Question, Rounds, times_of

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build/peers"
NEW_TOKENS = 32

console = Console(highlight=False, width=200)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit status."""
    parser = argparse.ArgumentParser(description="Time SmolLM2-135M in other engines and on compiled kernels.")
    parser.add_argument("--lengths", type=int, nargs="+", choices=FOR_ANSWERS, default=list(FOR_ANSWERS))
    parser.add_argument("--rounds", type=int, default=3, help="timed ones, after one that is not (default: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these, by the names that a run prints")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="of its environment")
    parser.add_argument("--save", type=Path, default=RESULTS, help="the folder that gets a file for each length")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except SurgeonError as error:
        console.print(f"peers: {error}", style="red", markup=False)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Starts the workers, asks them, and writes and prints what comes out of each length.

    Raises:
        ModelError: a name is not that of a peer, or the model or a text cannot be had.
    """
    folder, gguf = (make(SMOLLM2_135M, cache_folder(), say) for make in (model_folder, gguf_file))
    peers = roster(folder, gguf, options.threads, max(FOR_ANSWERS))
    unknown = set(options.peers or ()) - set(peers)
    if unknown:
        raise ModelError("--peers", f"some of {', '.join(peers)}", ", ".join(sorted(unknown)), "correct the names")
    chosen = {name: peer for name, peer in peers.items() if name in (options.peers or peers)}
    tokenizer = load_tokenizer(folder)
    LOGS.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        workers, left_out = started(chosen, options, stack)
        for length in options.lengths:
            remaining = {name: worker for name, worker in workers.items() if name not in left_out}
            rounds = Rounds(remaining, NEW_TOKENS, lambda tokens: str(tokenizer.decode(list(tokens))), say)
            rounds.run(questions(tokenizer, length, options.rounds), must_find=length == min(FOR_ANSWERS))
            left_out |= rounds.left_out
            result = {
                "machine": machine() | {"threads": options.threads},
                "length": length,
                "new_tokens": NEW_TOKENS,
                "rounds": options.rounds,
                "peers": {
                    name: {
                        "title": chosen[name].title,
                        "linear": chosen[name].linear,
                        "versions": workers[name].versions,
                        "right": record.right,
                        "asked": record.asked,
                        **times_of(record.timed),
                    }
                    for name, record in rounds.records.items()
                    if name not in left_out
                },
                "left_out": left_out,
            }
            text = json.dumps(result, indent=1) + "\n"
            (options.save / f"peers-{length}.json").write_text(text, encoding="utf-8")
            console.print(peers_table([result]), markup=False)


def questions(tokenizer: PreTrainedTokenizerBase, length: int, rounds: int) -> list[Question]:
    """One question more than there are rounds, about numbers at different depths."""
    fillers = windows(tokenizer, real_text(cache_folder(), say), length, most=len(DEPTHS))
    times = 1 + rounds // len(DEPTHS)
    prompts = make_prompts(tokenizer, fillers, (length - NEW_TOKENS,), times, plans=single_numbers)
    return [
        Question(tuple(map(int, (*prompt.text, *question.tokens))), question.query)
        for prompt in prompts[: 1 + rounds]
        for question in prompt.questions
    ]


def started(
    peers: Mapping[str, Peer], options: argparse.Namespace, stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The workers of those peers that start, closed by `stack`, and why the others do not."""
    workers: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    settings = {
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "passive",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "surgeon-peers-inductor"),
    }
    for name, peer in peers.items():
        python = options.vllm_python if peer.in_vllm else Path(sys.executable)
        try:
            log = LOGS / f"{name}.log"
            worker = Worker(python, peer.module, peer.settings, log, {**settings, **peer.environment})
        except ModelError as error:
            missing[name] = error.got
            say(f"{name}: left out: {error.got}")
            continue
        workers[name] = stack.enter_context(worker)
        say(f"{name}: {', '.join(f'{library} {version}' for library, version in worker.versions.items())}")
    return workers, missing


def say(line: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    console.print(f"[{time.perf_counter() - _STARTED:6.1f} s] {line}", style="dim", markup=False)


_STARTED = time.perf_counter()

if __name__ == "__main__":
    sys.exit(main())
