"""`surgeon assess`: the cost of thinning each head of a model, as a picture for the terminal or as JSON."""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_json, add_measured, density, path

if TYPE_CHECKING:
    from surgeon.compiler.learn.assess import Assessment
    from surgeon.compiler.learn.patterns.pattern import Grid
    from surgeon.compiler.learn.texts.text_file import TextFile


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured(parser)
    parser.add_argument(
        "--density", type=density, default=0.25, help="visible share of the block pairs to assess at; default: 0.25"
    )
    parser.add_argument(
        "--work",
        type=path,
        metavar="FOLDER",
        help="folder for the results of finished steps, so that the same command continues an interrupted run;"
        " default: a folder in the cache, removed at the end",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.patterns.reach import check_reachable, measured_blocks, suited_block
    from surgeon.compiler.learn.texts.text_file import read_text_file

    # What can be refused is refused before the work: here before torch is imported, below before weights are read.
    block = arguments.block or suited_block(arguments.density, arguments.length, arguments.measured_length)
    blocks = measured_blocks(arguments.length, arguments.measured_length, block)
    check_reachable(blocks, 1, arguments.density)
    files = [read_text_file(file) for file in arguments.text]

    from surgeon.compiler.learn.assess import assess, divided
    from surgeon.compiler.learn.measure.before_weights import read_outline
    from surgeon.compiler.learn.measure.checkpoint import check_decoder, read_model
    from surgeon.compiler.learn.patterns.pattern import Grid
    from surgeon.compiler.learn.texts.text import tokenize
    from surgeon.compiler.system.main_process import is_main_process
    from surgeon.compiler.system.stages import stage_display
    from surgeon.compiler.system.terminal import quiet_unless_watched
    from surgeon.runtime.evaluate.processes import joined

    grid = Grid(block, blocks, 1, arguments.density)
    quiet_unless_watched()
    with joined():
        outline = read_outline(arguments.model, arguments.device_map)
        check_decoder(outline.model)
        outline.warn_beyond_context(arguments.length, "--length")
        texts = [tokenize(file, outline.tokenizer) for file in files]
        divided(texts, grid, arguments.seed)
        model, _ = read_model(arguments.model, arguments.device_map, outline.tokenizer)
        work: Path | None = arguments.work or _work_folder(arguments, grid, files)
        with stage_display() as progress:
            found = assess(model, texts, grid, arguments.seed, work, progress)
    if arguments.work is None and work is not None and is_main_process():
        shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        return (json.dumps({"length": arguments.length} | dataclasses.asdict(found)),)
    return (*picture(found), *_scaled(found, arguments.length))


def _work_folder(arguments: argparse.Namespace, grid: "Grid", files: "Sequence[TextFile]") -> Path | None:
    """A folder in the cache for this command alone, so that it finds its own steps and may remove them.

    None if the cache cannot be written: then no steps are kept.
    """
    from surgeon.compiler.system.cache import cache_folder

    model = Path(arguments.model)
    asked = (str(model.resolve() if model.exists() else model), dataclasses.astuple(grid), arguments.seed)
    text = json.dumps((*asked, [file.sha256 for file in files]))
    folder = cache_folder() / "assess" / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _scaled(found: "Assessment", length: int) -> Iterator[str]:
    """A line on windows that learning would scale, if it was not measured at the length that they are for."""
    measured = found.grid.blocks * found.grid.block_size
    if measured != length:
        window = max(1, round(found.window * length / measured))
        yield f"measured at {measured:,} tokens; at {length:,} equal windows have {window} blocks, and shares are alike"


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
