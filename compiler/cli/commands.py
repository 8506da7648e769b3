"""The commands: each has a name, a summary, arguments, and a function from their values to the lines to print.

Heavy modules are imported where they are used: most of what a short command takes is imports.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from surgeon.compiler.cli.arguments import (
    assess_arguments,
    compile_arguments,
    export_arguments,
    inspect_arguments,
    learn_arguments,
    pilot_arguments,
    report_arguments,
    tune_arguments,
)


@dataclass(frozen=True)
class Outcome:
    """What standard output shows, and whether no threshold that the user gave was missed."""

    lines: Iterable[str]
    passed: bool = True


@dataclass(frozen=True)
class Command:
    """A subcommand: `configure` declares its arguments, `run` does the work.

    It returns what standard output shows, in an Outcome where a threshold can be missed.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterable[str] | Outcome]


def _compile(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.topology.read import read_topology

    started = time.perf_counter()
    topology = read_topology(arguments.topology)

    from surgeon.compiler.pipeline import compile_package
    from surgeon.compiler.specs.tiles import read_tiles
    from surgeon.compiler.system.terminal import progress_bar

    with progress_bar() as progress:
        package = compile_package(
            topology,
            arguments.out,
            targets=tuple(dict.fromkeys(arguments.target or ("cpu",))),
            dtypes=arguments.dtype and tuple(dict.fromkeys(arguments.dtype)),
            jobs=arguments.jobs,
            dump=arguments.dump,
            progress=progress,
            tiles=read_tiles(arguments.tiles) if arguments.tiles else None,
        )
    return _compiled(package, time.perf_counter() - started, arguments.json)


def _compiled(package: Path, seconds: float, as_json: bool) -> Iterable[str]:
    import hashlib

    from surgeon.runtime.package.manifest import Manifest

    text = (package / "manifest.json").read_bytes()
    manifest = Manifest.from_json(text.decode())
    size = len(text) + sum(file.size for file in manifest.files)
    if as_json:
        made = {
            "path": str(package),
            "id": hashlib.sha256(text).hexdigest(),
            "topology_sha256": manifest.topology_sha256,
            "targets": manifest.targets,
            "kernels": len(manifest.kernels),
            "bytes": size,
            "seconds": round(seconds, 3),
        }
        return (json.dumps(made),)
    kernels = f"{len(manifest.kernels)} kernel{'s' * (len(manifest.kernels) != 1)}"
    return (f"{package}: {kernels} for {', '.join(manifest.targets)}, {size:,} bytes, {seconds:.1f} s",)


def _inspect(arguments: argparse.Namespace) -> Iterable[str]:
    import shutil

    from surgeon.compiler.package.inspection import inspect, report_json

    report = inspect(arguments.path)
    if arguments.json:
        return (report_json(report),)
    from surgeon.compiler.package.inspection_text import report_lines

    encoding = (sys.stdout and sys.stdout.encoding) or "ascii"
    return report_lines(report, shutil.get_terminal_size().columns, encoding)


def _assess(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.cli.assess import run

    return run(arguments)


def _learn(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.cli.learn import run

    return run(arguments)


def _pilot(arguments: argparse.Namespace) -> Outcome:
    from surgeon.compiler.pilot.run import run

    lines, passed = run(arguments)
    return Outcome(lines, passed)


def _report(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.pilot.page import write_report

    size = write_report(arguments.pilot, arguments.topology, arguments.out, arguments.beside)
    return (f"{arguments.out}: {size:,} bytes",)


def _export(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.package.export_hf import export

    out = export(arguments.package, arguments.out)
    builds = sorted(path.name for path in (out / "build").iterdir())
    if arguments.json:
        return (json.dumps({"path": str(out), "builds": builds}),)
    return (f"{out}: {', '.join(builds)}",)


def _tune(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.cli.tune import run

    return run(arguments)


COMPILE = Command("compile", "Compile a topology into a package of attention kernels.", compile_arguments, _compile)
INSPECT = Command("inspect", "Show what a topology file or a package holds.", inspect_arguments, _inspect)
ASSESS = Command("assess", "Show what thinning each head of a model would cost.", assess_arguments, _assess)
LEARN = Command("learn", "Learn a topology from a frozen model and text.", learn_arguments, _learn)
PILOT = Command("pilot", "Try a package on its model: quality, speed, memory.", pilot_arguments, _pilot)
REPORT = Command("report", "Show a pilot and its topology on one page.", report_arguments, _report)
EXPORT = Command("export", "Write a package in the layout of another tool.", export_arguments, _export)
TUNE = Command("tune", "Choose GPU tiles by timing them on this machine's GPU.", tune_arguments, _tune)
COMMANDS = (COMPILE, INSPECT, ASSESS, LEARN, PILOT, REPORT, EXPORT, TUNE)
