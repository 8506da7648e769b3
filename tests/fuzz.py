"""Tries mutated topologies and packages against second, independent readers: `python -m tests.fuzz --seconds 60`.

It goes on where the state file says that the last run stopped, so a long run can be split. Every case follows from the
seed and its number; `--show topologies:17` runs one again. The exit status is 1 if a fault has been found.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from fuzzing import cases

KINDS = {"topologies": "fuzzing.topology_cases", "packages": "fuzzing.package_cases"}
"""The kinds of cases, and the modules that make them: topologies need no torch."""


def kind_of(name: str) -> cases.Kind:
    kind: cases.Kind = importlib.import_module(KINDS[name]).KIND
    return kind


def main() -> int:
    """Runs the cases that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"some of {', '.join(KINDS)}; all by default")
    parser.add_argument("--seconds", type=float, help="how long to try each kind")
    parser.add_argument("--cases", type=int, help="how many cases of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--state", type=Path, default=Path(".cache/fuzz.json"), help="where it stands, kept for the next run"
    )
    parser.add_argument("--show", metavar="KIND:CASE", help="run one case again and show it")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if options.show:
        return show(options.show, options.seed)
    if options.seconds is None and options.cases is None:
        options.seconds = 60.0
    options.state.parent.mkdir(parents=True, exist_ok=True)
    return max(run(kind, options) for kind in options.kinds)


def run(name: str, options: argparse.Namespace) -> int:
    """Runs the next cases of a kind and prints what came of all so far."""
    progress = cases.stored(options.state, options.seed, name)
    begun, first, saved = time.monotonic(), progress.next, 0.0
    count = 10**9 if options.cases is None else options.cases
    for _ in cases.run(kind_of(name), options.seed, progress, count, options.jobs, options.seconds):
        if time.monotonic() - saved > 2:
            saved = time.monotonic()
            cases.store(options.state, options.seed, name, progress)
    cases.store(options.state, options.seed, name, progress)
    seconds = time.monotonic() - begun
    print(f"{name}: cases {first} to {progress.next - 1} in {seconds:.0f} s; all {progress.next}: ", end="")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(progress.outcomes.items())), end="")
    print(
        f"; {progress.cpu_seconds * 1000 / max(1, progress.next):.2f} ms of CPU a case; {len(progress.faults)} faults"
    )
    for case, fault in list(progress.faults.items())[:20]:
        print(f"  {name}:{case}: {fault}")
    return int(bool(progress.faults))


def show(place: str, seed: int) -> int:
    """Runs one case again."""
    name, _, number = place.partition(":")
    kind = kind_of(name)
    with cases.scratch() as folder:
        shared = kind.prepare(folder)
        print(kind.describe(shared, cases.numbers(seed, name, int(number))))
        verdict = cases.run_case(kind, shared, seed, int(number))
    print(f"{verdict.outcome}: {verdict.fault or 'no fault'}")
    return int(bool(verdict.fault))


if __name__ == "__main__":
    sys.exit(main())
