"""`surgeon plan`: the gain and the cost to expect of a model on this machine, from one layer of its shape."""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_block, add_json, density, positive


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a GGUF file, or a name that Transformers can resolve; only its config is read",
    )
    parser.add_argument("--length", type=positive, default=2048, metavar="TOKENS", help="default: 2048")
    parser.add_argument(
        "--density", type=density, default=0.25, help="visible share of the block pairs to plan for; default: 0.25"
    )
    add_block(parser)
    parser.add_argument(
        "--recall",
        choices=("dense", "pattern"),
        default="dense",
        help="what the rows that ask read, as in patch: everything, or the pattern; default: dense",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.patterns.reach import blocks_of, check_reachable, suited_block

    block = arguments.block or suited_block(arguments.density, arguments.length)
    blocks = blocks_of(arguments.length, block)
    check_reachable(blocks, 1, arguments.density)

    import torch

    from surgeon.compiler.learn.patterns.pattern import Grid
    from surgeon.compiler.plan.estimate import plan_of
    from surgeon.compiler.plan.layer import read_planned
    from surgeon.compiler.plan.measure import measure_layer
    from surgeon.compiler.plan.text import plan_lines
    from surgeon.compiler.system.terminal import progress_bar, quiet_unless_watched, stdout_encoding

    grid = Grid(block, blocks, 1, arguments.density)
    quiet_unless_watched()
    planned = read_planned(arguments.model)
    with progress_bar() as progress, tempfile.TemporaryDirectory(prefix="surgeon-") as scratch:
        times = measure_layer(planned.config, grid, arguments.recall, Path(scratch), progress)
    plan = plan_of(planned, grid, times)
    if arguments.json:
        return (json.dumps(dataclasses.asdict(plan) | {"threads": torch.get_num_threads()}),)
    return plan_lines(plan, torch.get_num_threads(), stdout_encoding())


PLAN = Command("plan", "Show what a model can gain on this machine, before learning.", _add_arguments, _run)
