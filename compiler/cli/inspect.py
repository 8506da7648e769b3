"""`surgeon inspect`: shows the contents of a topology file or a package."""

import argparse
import shutil
from collections.abc import Iterable

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_json


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a topology file or a package")
    parser.add_argument("--files", action="store_true", help="also list a package's tools and files, with their hashes")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.package.inspection import inspect, report_json
    from surgeon.compiler.package.inspection_text import report_lines
    from surgeon.compiler.system.terminal import stdout_encoding

    report = inspect(arguments.path)
    if arguments.json:
        return (report_json(report),)
    return report_lines(report, shutil.get_terminal_size().columns, stdout_encoding(), arguments.files)


INSPECT = Command("inspect", "Show the contents of a topology file or a package.", _add_arguments, _run)
