"""`surgeon report`: shows a pilot and its topology on one HTML page."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import path


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pilot", type=path, metavar="pilot.json", help="the file written by surgeon pilot")
    parser.add_argument("topology", type=path, metavar="topology.json", help="the topology that was tried")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        type=path,
        metavar="pilot.json",
        help="a pilot of another topology on the same model and texts, for the curves; repeatable",
    )
    parser.add_argument("--out", type=path, default=Path("report.html"), metavar="FILE", help="default: report.html")


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.system.atomic_files import check_file
    from surgeon.runtime.errors import PilotError

    check_file(arguments.out, PilotError)

    from surgeon.compiler.pilot.page import write_report

    size = write_report(arguments.pilot, arguments.topology, arguments.out, arguments.beside)
    return (f"{arguments.out}: {size:,} bytes",)


REPORT = Command("report", "Show a pilot and its topology on one page.", _add_arguments, _run)
