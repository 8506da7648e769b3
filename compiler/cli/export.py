"""`surgeon export`: writes a package in the layout of another tool."""

import argparse
import json
from collections.abc import Iterable

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_json, path


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="the kernel package")
    parser.add_argument("--format", required=True, choices=("hf-kernels",), help="hf-kernels: for get_local_kernel")
    parser.add_argument("--out", required=True, type=path, metavar="FOLDER", help="the folder to write or replace")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.package.export_hf import export

    out = export(arguments.package, arguments.out)
    builds = sorted(build.name for build in (out / "build").iterdir())
    if arguments.json:
        return (json.dumps({"path": str(out), "builds": builds}),)
    return (f"{out}: {', '.join(builds)}",)


EXPORT = Command("export", "Write a package in the layout of another tool.", _add_arguments, _run)
