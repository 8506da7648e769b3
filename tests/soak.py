"""Long runs of what fails only sometimes: loads beside continuous compiles, threads on one model, and a busy server.

From the root of the tree: `python -m tests.soak loads --times 10000` and `python -m tests.soak threads --minutes 10`;
in vLLM's environment, `python -m tests.soak vllm --requests 1000`. The status is 1 if anything failed. `test_soak.py`
and `runtime/vllm/engine/test_load.py` run a small part of each.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("helpers")))

from engines import ENVIRONMENT, Engine, make_world
from load_soak import load_beside_compiles
from models import sparse_topology
from serving_soak import PAGES, RECALLS, SETTINGS, mixed_requests, serve_mixed
from surgeon.compiler import compile_package
from surgeon.runtime import load
from thread_soak import call_from_threads, mixed_calls, resident

MAX_GROWTH = 0.05
"""Of the process's memory, in a run of many rounds."""


def loads(times: int) -> list[str]:
    """Loads a package so many times beside compiles; returns the faults."""
    before, started = resident(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = load_beside_compiles(Path(folder), times)
    print(f"{found.loads} loads in {time.monotonic() - started:.0f} s, {found.compiles} compiles beside them")
    print(f"{found.changes} loads found another package than the one before; {len(found.faults)} faults")
    print(f"memory {before:.0f} MiB before, {resident():.0f} MiB after")
    return found.faults


def threads(minutes: float) -> list[str]:
    """Generates and attends from several threads for so long; returns the faults."""
    with tempfile.TemporaryDirectory() as folder:
        package = load(compile_package(sparse_topology(), Path(folder) / "kernels", dtypes=("fp32",)), strict=True)
    found = call_from_threads(mixed_calls(package), 60 * minutes)
    print(f"{found.calls} calls in {found.rounds} rounds; {len(found.faults)} faults; memory {found.growth:+.1%}")
    grown = [f"memory grew by {found.growth:.1%}"] if found.rounds >= 10 and found.growth > MAX_GROWTH else []
    return [*found.faults, *grown]


def vllm(requests: int, recall: str, seed: int) -> list[str]:
    """Serves so many mixed requests with vLLM, in this process; returns the faults."""
    os.environ |= ENVIRONMENT  # before vLLM is imported
    with tempfile.TemporaryDirectory() as folder:
        world, before = make_world(Path(folder)), resident()
        engine = Engine(world, "mixed", recall, num_gpu_blocks_override=PAGES[recall], **SETTINGS)
        found = serve_mixed(world, engine, mixed_requests(requests, seed), recall, seed)
    print(f"recall {recall}: {found.requests} requests, {found.left} left by their clients; {len(found.faults)} faults")
    print(f"{found.preemptions} preemptions, {found.prefix_hits} requests with prefix hits")
    print(f"memory {before:.0f} MiB before the engine, {resident():.0f} MiB after")
    return found.faults


def main() -> int:
    """Runs the command that the arguments name and prints the first faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("loads").add_argument("--times", type=int, default=10_000)
    commands.add_parser("threads").add_argument("--minutes", type=float, default=10)
    serving = commands.add_parser("vllm")
    serving.add_argument("--requests", type=int, default=1000)
    serving.add_argument("--recall", choices=RECALLS, default=RECALLS[0])
    serving.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "loads":
        faults = loads(arguments.times)
    elif arguments.command == "threads":
        faults = threads(arguments.minutes)
    else:
        faults = vllm(arguments.requests, arguments.recall, arguments.seed)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
