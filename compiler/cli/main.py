"""The command line: `surgeon COMMAND …`, and `surgeon-compile …` for its first command.

Everything that all commands share is here: errors, the exit status, safe printing. Each command has its own file.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from surgeon.compiler.cli.assess import ASSESS
from surgeon.compiler.cli.command import Command, Outcome
from surgeon.compiler.cli.compile import COMPILE
from surgeon.compiler.cli.export import EXPORT
from surgeon.compiler.cli.inspect import INSPECT
from surgeon.compiler.cli.learn import LEARN
from surgeon.compiler.cli.pilot import PILOT
from surgeon.compiler.cli.plan import PLAN
from surgeon.compiler.cli.report import REPORT
from surgeon.compiler.cli.tune import TUNE
from surgeon.compiler.system.main_process import is_main_process, let_the_main_process_speak
from surgeon.compiler.system.termination import Terminated, terminable
from surgeon.runtime.errors import BuildError, SurgeonError, printable, reason_of, remedy_for

COMMANDS = (COMPILE, INSPECT, PLAN, ASSESS, LEARN, PILOT, REPORT, EXPORT, TUNE)

DONE = 0
FAILED = 1
BAD_INPUT = 2
THRESHOLD_MISSED = 3
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
READER_LEFT = 141  # 128 + SIGPIPE
TERMINATED = 128  # + the signal

TRACEBACK = "SURGEON_TRACEBACK"
"""The environment variable that, if set, lets an error that nobody foresaw show its traceback."""


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
    """Reports a usage error as an exception, so that it is printed like every other error, and suggests what was meant.

    An unknown option is told by the command that does not know it, and before what is missing: a misspelled option is
    missing too.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses what this command knows; all that a command does not know is an error of its own."""
        given = list(sys.argv[1:] if args is None else args)
        is_command = self._subparsers is None
        self._check_options(given if is_command else given[:1])
        parsed, left = super().parse_known_args(given, namespace)
        if is_command and left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return parsed, left

    def error(self, message: str) -> NoReturn:
        refused = re.search(r"invalid choice: (?:'|\")?(.*?)(?:'|\")? \(choose from (.*)\)", message)
        hint = _suggestion(refused[1], [each.strip("'\"") for each in refused[2].split(", ")]) if refused else ""
        raise _UsageError(f"{message}{hint}; see {self.prog} --help")

    def _check_options(self, given: list[str]) -> None:
        options = [argument.partition("=")[0] for argument in given[: (*given, "--").index("--")]]
        known = self._option_string_actions
        unknown = [option for option in options if option.startswith("--") and option not in known]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(unknown[0], known)}")


def _suggestion(word: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")


def _configure(parser: argparse.ArgumentParser, command: Command) -> None:
    command.configure(parser)
    parser.set_defaults(command=command)


def _status(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    try:
        with terminable():
            outcome = _outcome(parser, argv)
        status = _show(outcome.lines)
        if status == DONE and outcome.reason is not None:
            return _report(outcome.reason, THRESHOLD_MISSED)
        if status != DONE:
            let_the_main_process_speak()
        return status
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except Terminated as ended:
        return _report(f"ended by {ended}", TERMINATED + ended.signal)
    except BuildError as error:
        return _report(str(error), FAILED)
    except (SurgeonError, _UsageError) as error:
        return _report(str(error), BAD_INPUT)
    except SystemExit:
        raise
    except BaseException as error:  # also what a library in Rust raises when it panics
        if os.environ.get(TRACEBACK):
            raise
        return _report(_unforeseen(error, parser.prog, argv), FAILED)


def _outcome(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Outcome:
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help and --version have printed
        return Outcome(())
    command: Command = arguments.command
    outcome = command.run(arguments)
    return outcome if isinstance(outcome, Outcome) else Outcome(outcome)


def _show(lines: Iterable[str]) -> int:
    if not is_main_process():
        return DONE
    text = "".join(f"{printable(line)}\n" for line in lines)
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
            print(f"surgeon: {printable(message)}", file=sys.stderr, flush=True)
    return status


def _unforeseen(error: BaseException, program: str, argv: Sequence[str] | None) -> str:
    """The line for an error that no stage turned into one of ours."""
    first = (sys.argv[1:] if argv is None else argv)[:1]
    command = " ".join([program, *(name for name in first if name in {known.name for known in COMMANDS})])
    if isinstance(error, OSError):
        place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None) or command
        remedy = remedy_for(error, "")
        return f"{place}: {reason_of(error)}" + (f"; {remedy}" if remedy else "")
    if isinstance(error, MemoryError):
        return f"{command}: expected enough memory, got too little; {remedy_for(error, '')}"
    return (
        f"{command}: {type(error).__name__}: {reason_of(error)}; nobody foresaw this: set {TRACEBACK}=1 and run it "
        "again to see where it comes from"
    )
