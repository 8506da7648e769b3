"""The command line: `surgeon COMMAND …`, and `surgeon-compile …` for its first command.

A command is an entry of COMMANDS: what argparse must know, and a function from its arguments to the lines to print.
What holds for all of them (errors, exit status, safe printing) is here once. Heavy modules are imported where they are
used: most of what a short command takes is imports.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from surgeon.runtime.errors import BuildError, SurgeonError
from surgeon.runtime.target import DTYPES

DONE = 0
FAILED = 1
BAD_INPUT = 2
THRESHOLD_MISSED = 3
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
READER_LEFT = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Outcome:
    """What standard output shows, and the exit status where that can be shown."""

    lines: Iterable[str]
    status: int = DONE


@dataclass(frozen=True)
class Command:
    """A subcommand: `configure` declares its arguments, `run` does the work.

    It returns what standard output shows, in an Outcome where it may end with another status than 0.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterable[str] | Outcome]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `surgeon` with the arguments given, or the process's, and returns the exit status."""
    summary = "Compiles a learned topology into block-sparse attention kernels."
    parser = _Parser(prog="surgeon", description=summary, allow_abbrev=False)
    _add_version(parser)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary, allow_abbrev=False
        )
        _configure(subparser, command)
    return _status(parser, argv)


def main_compile(argv: Sequence[str] | None = None) -> int:
    """Runs `surgeon-compile`, which is `surgeon compile`, and returns the exit status."""
    parser = _Parser(prog="surgeon-compile", description=COMPILE.summary, allow_abbrev=False)
    _add_version(parser)
    _configure(parser, COMPILE)
    return _status(parser, argv)


class _UsageError(Exception):
    pass


class _ShowVersion(argparse.Action):
    """As argparse's own, which wants to know the version before anybody has asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from surgeon.compiler.versions import version_of

        print(f"surgeon {version_of('surgeon') or 'of a source tree that is not installed'}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as an exception, so that it is printed like every other error."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")


def _configure(parser: argparse.ArgumentParser, command: Command) -> None:
    command.configure(parser)
    parser.set_defaults(run=command.run)


def _status(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    try:
        outcome = _outcome(parser, argv)
        return _show(outcome.lines) or outcome.status
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except BuildError as error:
        return _report(str(error), FAILED)
    except (SurgeonError, _UsageError) as error:
        return _report(str(error), BAD_INPUT)
    except OSError as error:
        return _report(_os_error(error), FAILED)


def _outcome(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Outcome:
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help and --version have printed
        return Outcome(())
    run: Callable[[argparse.Namespace], Iterable[str] | Outcome] = arguments.run
    outcome = run(arguments)
    return outcome if isinstance(outcome, Outcome) else Outcome(outcome)


def _show(lines: Iterable[str]) -> int:
    text = "".join(f"{_printable(line)}\n" for line in lines)
    if sys.stdout is None:  # started with standard output closed
        return DONE
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except BrokenPipeError:
        _abandon_stdout()
        return READER_LEFT
    except OSError as error:
        _abandon_stdout()
        return _report(f"standard output: {error.strerror or error}", FAILED)
    return DONE


def _abandon_stdout() -> None:
    # The interpreter flushes once more at exit, and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody listens: the status still tells
        if sys.stderr is not None:
            print(f"surgeon: {_printable(message)}", file=sys.stderr, flush=True)
    return status


def _printable(text: str) -> str:
    """The text on one line, with control, direction and other unprintable characters spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _os_error(error: OSError) -> str:
    place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place}: {reason}" if place else reason


def _configure_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topology", metavar="topology.json", help="the learned topology")
    parser.add_argument("--out", required=True, type=_path, metavar="FOLDER", help="the package to make or to replace")
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="cpu, cuda:<compute capability> or hip:<gfx name>, for instance cuda:90; repeatable; default: cpu",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeatable; default: every dtype that each target takes"
    )
    _add_jobs(parser)
    parser.add_argument("--tiles", type=_path, metavar="FILE", help="a table of GPU tiles, as surgeon tune writes it")
    parser.add_argument("--dump", type=_path, metavar="FOLDER", help="write the product of every stage there")
    _add_json(parser)


def _compile(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.read import read_topology

    started = time.perf_counter()
    topology = read_topology(arguments.topology)

    from surgeon.compiler.pipeline import compile_package
    from surgeon.compiler.progress import progress_bar
    from surgeon.compiler.tiles import read_tiles

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

    from surgeon.runtime.manifest import Manifest

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


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a topology file or a package")
    _add_json(parser)


def _inspect(arguments: argparse.Namespace) -> Iterable[str]:
    import shutil

    from surgeon.compiler.inspection import inspect, report_json

    report = inspect(arguments.path)
    if arguments.json:
        return (report_json(report),)
    from surgeon.compiler.listing import report_lines

    encoding = (sys.stdout and sys.stdout.encoding) or "ascii"
    return report_lines(report, shutil.get_terminal_size().columns, encoding)


def _add_model_and_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or a name that Transformers knows")
    parser.add_argument(
        "--text", action="append", required=True, type=_path, metavar="FILE", help="UTF-8 text; repeatable"
    )


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """What to measure a frozen model on."""
    _add_model_and_text(parser)
    parser.add_argument("--length", type=_positive, default=2048, metavar="TOKENS", help="default: 2048")
    parser.add_argument("--block", type=_positive, default=64, metavar="TOKENS", help="default: 64")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="default: 0")


def _configure_assess(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument(
        "--density", type=_density, default=0.25, help="visible share of the block pairs to assess at; default: 0.25"
    )
    parser.add_argument("--work", type=_path, metavar="FOLDER", help="where finished steps are kept; default: nowhere")
    _add_json(parser)


def _assess(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.assess_command import run

    return run(arguments)


def _configure_learn(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument(
        "--density", required=True, type=_density, help="visible share of the block pairs, for instance 0.25"
    )
    parser.add_argument("--out", required=True, type=_path, metavar="topology.json", help="the file to write")
    parser.add_argument(
        "--measured-length",
        type=_positive,
        metavar="TOKENS",
        help="learn on sequences of this length and scale the windows to --length; default: --length",
    )
    parser.add_argument(
        "--method",
        choices=("budget", "ultrametric", "window"),
        default="budget",
        help="ultrametric: trees by gradient descent; window: equal windows; default: budget",
    )
    parser.add_argument("--steps", type=_positive, default=60, metavar="N", help="steps of ultrametric; default: 60")
    parser.add_argument(
        "--arity", type=int, choices=(2, 3, 5, 7), default=2, help="of ultrametric's digits; default: 2"
    )
    parser.add_argument(
        "--cuts", action="store_true", help="also try clusters; a head gets one where it pays on text not used for it"
    )
    parser.add_argument(
        "--work",
        type=_path,
        metavar="FOLDER",
        help="where finished steps are kept, so that the same command continues an interrupted run; default: a folder"
        " beside --out, removed at the end",
    )
    _add_json(parser)


def _learn(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.command import run

    return run(arguments)


def _configure_pilot(parser: argparse.ArgumentParser) -> None:
    _add_model_and_text(parser)
    parser.add_argument("package", type=_path, metavar="PACKAGE", help="the kernel package to try")
    parser.add_argument("--out", type=_path, default=Path("pilot.json"), metavar="FILE", help="default: pilot.json")
    parser.add_argument("--length", type=_positive, metavar="TOKENS", help="default: the topology's own")
    parser.add_argument(
        "--sequences", type=_positive, default=4, metavar="N", help="sequences of each text, spread over it; default: 4"
    )
    parser.add_argument(
        "--passkeys",
        type=_natural,
        default=2,
        metavar="N",
        help="numbers to be found, for each of five depths and two lengths; default: 2",
    )
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="of timing; default: 5")
    parser.add_argument("--no-window", action="store_true", help="leave out the model with equal windows")
    parser.add_argument(
        "--max-ppl-ratio", type=_ratio, metavar="X", help="exit with 3 where perplexity over dense is above this"
    )
    parser.add_argument(
        "--min-speedup", type=_ratio, metavar="X", help="exit with 3 where the first token's speed-up is below this"
    )
    _add_json(parser)


def _pilot(arguments: argparse.Namespace) -> Outcome:
    from surgeon.compiler.pilot import run

    lines, passed = run(arguments)
    return Outcome(lines, DONE if passed else THRESHOLD_MISSED)


def _configure_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pilot", type=_path, metavar="pilot.json", help="what surgeon pilot wrote")
    parser.add_argument("topology", type=_path, metavar="topology.json", help="the topology that was tried")
    parser.add_argument("--out", type=_path, default=Path("report.html"), metavar="FILE", help="default: report.html")


def _report_page(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.report import write_report

    size = write_report(arguments.pilot, arguments.topology, arguments.out)
    return (f"{arguments.out}: {size:,} bytes",)


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="the kernel package")
    parser.add_argument("--format", required=True, choices=("hf-kernels",), help="hf-kernels: for get_local_kernel")
    parser.add_argument("--out", required=True, type=_path, metavar="FOLDER", help="the folder to make or to replace")
    _add_json(parser)


def _export(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.hf_kernels import export

    out = export(arguments.package, arguments.out)
    builds = sorted(path.name for path in (out / "build").iterdir())
    if arguments.json:
        return (json.dumps({"path": str(out), "builds": builds}),)
    return (f"{out}: {', '.join(builds)}",)


def _configure_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topology", metavar="topology.json", help="the topology whose schedules are timed")
    parser.add_argument("--out", required=True, type=_path, metavar="FILE", help="the table of tiles to write")
    parser.add_argument("--layer", type=_natural, default=0, metavar="N", help="the layer that is timed; default: 0")
    parser.add_argument(
        "--head-dim",
        action="append",
        type=_positive,
        metavar="N",
        help="a head size to choose tiles for; repeatable; default: the topology's own",
    )
    parser.add_argument("--tiles", type=_path, metavar="FILE", help="a table to start from, instead of Surgeon's own")
    _add_jobs(parser)
    _add_json(parser)


def _tune(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.tune.command import run

    return run(arguments)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=_positive, metavar="N", help="compilers at once; default: one a processor")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


COMPILE = Command("compile", "Compile a topology into a package of attention kernels.", _configure_compile, _compile)
INSPECT = Command("inspect", "Show what a topology file or a package holds.", _configure_inspect, _inspect)
ASSESS = Command("assess", "Show what thinning each head of a model would cost.", _configure_assess, _assess)
LEARN = Command("learn", "Learn a topology from a frozen model and text.", _configure_learn, _learn)
PILOT = Command("pilot", "Try a package on its model: quality, speed, memory.", _configure_pilot, _pilot)
REPORT = Command("report", "Show a pilot and its topology on one page.", _configure_report, _report_page)
EXPORT = Command("export", "Write a package in the layout of another tool.", _configure_export, _export)
TUNE = Command("tune", "Choose GPU tiles by timing them on this machine's GPU.", _configure_tune, _tune)
COMMANDS = (COMPILE, INSPECT, ASSESS, LEARN, PILOT, REPORT, EXPORT, TUNE)
