"""`surgeon compile`, also `surgeon-compile`: compiles a topology to a package of attention kernels."""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_jobs, add_json, path
from surgeon.runtime.package.target import DTYPES


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topology", metavar="topology.json", help="the learned topology")
    parser.add_argument("--out", required=True, type=path, metavar="FOLDER", help="the package to write or replace")
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="cpu, cuda:<compute capability> or hip:<gfx name>, for example cuda:90; repeatable; default: cpu",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeatable; default: every dtype that each target supports"
    )
    parser.add_argument(
        "--paged",
        action="store_true",
        help="for GPUs also kernels for keys and values in pages, which vLLM needs",
    )
    add_jobs(parser)
    parser.add_argument("--tiles", type=path, metavar="FILE", help="a table of GPU tiles written by surgeon tune")
    parser.add_argument("--dump", type=path, metavar="FOLDER", help="write the output of every stage to this folder")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
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
            paged=arguments.paged,
        )
    return _lines(package, time.perf_counter() - started, arguments.json)


def _lines(package: Path, seconds: float, as_json: bool) -> Iterable[str]:
    import hashlib

    from surgeon.runtime.package.manifest import Manifest

    text = (package / "manifest.json").read_bytes()
    manifest = Manifest.from_json(text.decode())
    identity = hashlib.sha256(text).hexdigest()
    size = len(text) + sum(file.size for file in manifest.files)
    if as_json:
        made = {
            "path": str(package),
            "id": identity,
            "topology_sha256": manifest.topology_sha256,
            "targets": manifest.targets,
            "kernels": len(manifest.kernels),
            "bytes": size,
            "seconds": round(seconds, 3),
        }
        return (json.dumps(made),)
    kernels = f"{len(manifest.kernels)} kernel{'s' * (len(manifest.kernels) != 1)}"
    return (
        f"{package}: {kernels} for {', '.join(manifest.targets)}, {size:,} bytes, {seconds:.1f} s",
        f"id {identity}",
    )


COMPILE = Command("compile", "Compile a topology into a package of attention kernels.", _add_arguments, _run)
