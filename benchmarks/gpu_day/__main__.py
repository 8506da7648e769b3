"""Proves, tunes and times the kernels on a GPU in a few minutes, from packages that were compiled beforehand.

From a source tree, first on a machine without a GPU, which takes a few minutes, then on one with a Hopper card:

    benchmarks/from_source python benchmarks/gpu_day --packages gpu-packages --prepare
    benchmarks/from_source python benchmarks/gpu_day --packages gpu-packages --out gpu-results

Then, where the repository is, its results become a file of benchmarks/results and tables of the README pages:

    benchmarks/from_source python benchmarks/gpu_day --out gpu-results --keep

Results are written after every stage. With `--day rehearsal` both run on a CPU, in a minute, to try everything but the
card.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_day.day import DAYS
from gpu_day.kept import keep
from gpu_day.packages import MAX_BYTES, prepare
from gpu_day.run import run, tell_rows
from gpu_day.stages import STAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares or runs a day and returns the exit status: 1 if a stage failed or the packages are too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a folder for the compiled packages")
    parser.add_argument("--prepare", action="store_true", help="compile them, and run nothing")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder for the results")
    parser.add_argument("--keep", action="store_true", help="put the results in --out into the repository; run nothing")
    parser.add_argument("--day", choices=DAYS, default="hopper")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--go-on", action="store_true", help="run the other stages even if the smoke call fails")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # of a child process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.keep:
        import readme  # takes seconds, and nothing else needs it

        print(keep(options.out))
        return readme.main()
    if options.packages is None:
        parser.error("--packages: expected a folder, got none")
    if options.prepare:
        size = prepare(DAYS[options.day], options.packages)
        print(f"{options.packages}: {size / 2**20:.1f} MiB of at most {MAX_BYTES / 2**20:.0f}")
        return int(size > MAX_BYTES)
    if options.stage:
        tell_rows(options.stage, options.day, options.packages, options.rows)
        return 0
    results = run(options.day, options.packages, options.out, options.stages, options.go_on)
    return int(any(found["status"] != "done" for found in results["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
