"""The command line: `surgeon COMMAND …`, and `surgeon-compile …` for its first command.

Everything that all commands share is here: errors, the exit status, safe printing. Each command has its own file.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from surgeon.compiler.cli.assess import ASSESS
from surgeon.compiler.cli.command import Command, Outcome
from surgeon.compiler.cli.compile import COMPILE
from surgeon.compiler.cli.export import EXPORT
from surgeon.compiler.cli.inspect import INSPECT
from surgeon.compiler.cli.learn import LEARN
from surgeon.compiler.cli.pilot import PILOT
from surgeon.compiler.cli.report import REPORT
from surgeon.compiler.cli.tune import TUNE
from surgeon.compiler.system.main_process import is_main_process, let_the_main_process_speak
from surgeon.runtime.errors import BuildError, SurgeonError

COMMANDS = (COMPILE, INSPECT, ASSESS, LEARN, PILOT, REPORT, EXPORT, TUNE)

DONE = 0
FAILED = 1
BAD_INPUT = 2
THRESHOLD_MISSED = 3
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
READER_LEFT = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `surgeon` with the given arguments, or the process's own, and returns the exit status."""
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
    """Runs `surgeon-compile`, the same as `surgeon compile`, and returns the exit status."""
    parser = _Parser(prog="surgeon-compile", description=COMPILE.summary, allow_abbrev=False)
    _add_version(parser)
    _configure(parser, COMPILE)
    return _status(parser, argv)


class _UsageError(Exception):
    pass


class _ShowVersion(argparse.Action):
    """Shows the version, which is only looked up when asked for; argparse's own action needs it up front."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from surgeon.runtime.installation import DISTRIBUTION, version

        print(f"{DISTRIBUTION} {version()}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Reports a usage error as an exception, so that it is printed like every other error."""

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
        status = _show(outcome.lines)
        if status == DONE and outcome.reason is not None:
            return _report(outcome.reason, THRESHOLD_MISSED)
        if status != DONE:
            let_the_main_process_speak()
        return status
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
    if not is_main_process():
        return DONE
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
    # The interpreter flushes again at exit, and would report the same error again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str, status: int) -> int:
    let_the_main_process_speak()
    with contextlib.suppress(OSError):  # nobody is reading; the exit status still tells
        if sys.stderr is not None:
            print(f"surgeon: {_printable(message)}", file=sys.stderr, flush=True)
    return status


def _printable(text: str) -> str:
    """The text on one line, with control, direction and other unprintable characters escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _os_error(error: OSError) -> str:
    place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place}: {reason}" if place else reason
