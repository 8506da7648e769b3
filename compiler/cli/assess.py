"""`surgeon assess`: the cost of thinning each head of a model, as a picture for the terminal or as JSON."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_json, add_measured, density, path

if TYPE_CHECKING:
    from surgeon.compiler.learn.assess import Assessment


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured(parser)
    parser.add_argument(
        "--density", type=density, default=0.25, help="visible share of the block pairs to assess at; default: 0.25"
    )
    parser.add_argument(
        "--work", type=path, metavar="FOLDER", help="folder for the results of finished steps; default: none are kept"
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.assess import assess
    from surgeon.compiler.learn.learn import blocks_of
    from surgeon.compiler.learn.measure.checkpoint import read_model
    from surgeon.compiler.learn.measure.text import read_text
    from surgeon.compiler.learn.patterns.pattern import Grid
    from surgeon.compiler.system.stages import stage_display
    from surgeon.compiler.system.terminal import quiet_unless_watched
    from surgeon.runtime.evaluate.processes import joined

    grid = Grid(arguments.block, blocks_of(arguments.length, arguments.block), 1, arguments.density)
    quiet_unless_watched()
    with joined():
        model, tokenizer = read_model(arguments.model, arguments.device_map)
        texts = [read_text(file, tokenizer) for file in arguments.text]
        with stage_display() as progress:
            found = assess(model, texts, grid, arguments.seed, arguments.work, progress)
    return (json.dumps(dataclasses.asdict(found)),) if arguments.json else tuple(picture(found))


def picture(found: "Assessment") -> Iterator[str]:
    """The assessment as lines of text: one digit per head, then the figures."""
    import numpy as np

    cost = np.array(found.cost)
    ranks = cost.ravel().argsort(kind="stable").argsort(kind="stable").reshape(cost.shape)
    tenths = ranks * 10 // cost.size
    yield f"What equal windows at {found.grid.density:.0%} of the blocks cost, a digit a head: 9 the costliest tenth"
    for layer, row in enumerate(tenths):
        share = cost[layer].sum()
        yield f"layer {layer:3d}  {''.join(map(str, row))}  {share:6.1%} of the cost"
    missed = np.array(found.missed)
    most = divmod(int(missed.argmax()), missed.shape[1])
    yield (
        f"attention beyond the sink and the last {found.window} blocks: {missed.mean():.1%} on average, most in "
        f"layer {most[0]}, head {most[1]}: {missed.max():.1%}"
    )
    if found.stability is not None:
        yield f"rank correlation of the heads' costs between texts: {found.stability:.2f}"
    yield f"equal windows at {found.grid.density:.0%}: KL divergence {found.measured:.4f} nats a token, measured"
    for point in found.curve:
        yield (
            f"  at {point.density:.0%} of the blocks expect {point.allocated:.4f} with windows by cost, "
            f"{point.equal:.4f} with equal ones"
        )


ASSESS = Command("assess", "Show the cost of thinning each head of a model.", _add_arguments, _run)
