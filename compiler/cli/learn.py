"""`surgeon learn`: learns a topology file from a frozen model and text."""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.compiler.cli.command import Command
from surgeon.compiler.cli.values import add_json, add_measured, density, path, positive

if TYPE_CHECKING:
    from surgeon.compiler.topology.topology import Topology


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measured(parser)
    parser.add_argument(
        "--density", required=True, type=density, help="visible share of the block pairs, for example 0.25"
    )
    parser.add_argument("--out", required=True, type=path, metavar="topology.json", help="the file to write")
    parser.add_argument(
        "--method",
        choices=("budget", "ultrametric", "window"),
        default="budget",
        help="ultrametric: trees by gradient descent; window: equal windows; default: budget",
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("answers", "text"),
        help="answers: what follows a prompt and reads all of it, as patched models do by default; text: every token,"
        ' as with recall="pattern"; default: answers, but text for ultrametric',
    )
    parser.add_argument(
        "--route",
        choices=("none", "convert", "learned"),
        default="none",
        help='let heads choose blocks by content; for text, and for recall="pattern". convert: every head, as many as'
        " its window has beyond the nearest 64 or 128 tokens, if validation text is then followed better; learned: in"
        " any case, and the quarter of the heads that brings back most facts from afar 352 tokens' worth at least;"
        " default: none",
    )
    parser.add_argument(
        "--retrieve", dest="route", action="store_const", const="learned", help="short for --route learned"
    )
    parser.add_argument(
        "--windows",
        type=path,
        metavar="topology.json",
        help="take the windows of this topology, in its blocks and scaled to the length, instead of learning them",
    )
    parser.add_argument(
        "--near",
        type=positive,
        metavar="TOKENS",
        help="with --route: the tokens that stay a routed head's window; default: 64 or 128, whichever follows"
        " validation text better",
    )
    parser.add_argument(
        "--questions",
        action="store_true",
        help="learn for answers also on text with hidden facts, which ends with questions about them, not only on plain"
        " text",
    )
    parser.add_argument(
        "--steps", type=positive, default=60, metavar="N", help="training steps of ultrametric; default: 60"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences per step of ultrametric; default: 1"
    )
    parser.add_argument(
        "--arity", type=int, choices=(2, 3, 5, 7), default=2, help="arity of ultrametric's digits; default: 2"
    )
    parser.add_argument(
        "--cuts", action="store_true", help="also try clusters; a head gets them if they help on held-out text"
    )
    parser.add_argument(
        "--work",
        type=path,
        metavar="FOLDER",
        help="folder for the results of finished steps, so that the same command continues an interrupted run;"
        " default: a folder beside --out, removed at the end",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> Iterable[str]:
    from surgeon.compiler.learn.patterns.reach import check_reachable, measured_blocks, suited_block
    from surgeon.compiler.learn.texts.text_file import read_text_file
    from surgeon.compiler.system.atomic_files import check_file
    from surgeon.compiler.topology.read import read_topology
    from surgeon.runtime.errors import ModelError, TopologyError
    from surgeon.runtime.installation import required

    started = time.perf_counter()
    # What can be refused is refused before the work: here before torch is imported, below before weights are read.
    clusters = arguments.cuts or arguments.method == "ultrametric"
    windows = None if arguments.windows is None else read_topology(arguments.windows)
    own = suited_block(arguments.density, arguments.length, arguments.measured_length)
    block = arguments.block or (own if windows is None else windows.block_size)
    blocks = measured_blocks(arguments.length, arguments.measured_length, block, clusters)
    check_reachable(blocks, 1, arguments.density)
    if arguments.cuts:
        required("scipy", ModelError, "--cuts")
    out: Path = arguments.out
    with contextlib.suppress(OSError):  # what is wrong is said below
        out.parent.mkdir(parents=True, exist_ok=True)
    check_file(out, TopologyError)
    files = [read_text_file(file) for file in arguments.text]

    from surgeon.compiler.learn.learn import Request, divided, learn
    from surgeon.compiler.learn.measure.before_weights import read_outline
    from surgeon.compiler.learn.measure.checkpoint import check_decoder, read_model
    from surgeon.compiler.learn.patterns.to_topology import write_topology
    from surgeon.compiler.learn.texts.text import tokenize
    from surgeon.compiler.learn.ultrametric.descent import Settings
    from surgeon.compiler.system.main_process import is_main_process
    from surgeon.compiler.system.stages import stage_display
    from surgeon.compiler.system.terminal import quiet_unless_watched
    from surgeon.runtime.evaluate.processes import joined

    request = Request(
        density=arguments.density,
        length=arguments.length,
        block_size=block,
        method=arguments.method,
        seed=arguments.seed,
        measured_length=arguments.measured_length,
        cuts=arguments.cuts,
        purpose=arguments.purpose,
        route=None if arguments.route == "none" else arguments.route,
        windows=windows,
        questions=arguments.questions,
        near=arguments.near,
        settings=Settings(steps=arguments.steps, batch=arguments.batch, arity=arguments.arity),
    )
    request.grid(blocks)
    work: Path = arguments.work or out.with_name(out.name + ".steps")
    quiet_unless_watched()
    with joined():
        outline = read_outline(arguments.model, arguments.device_map)
        check_decoder(outline.model)
        outline.warn_beyond_context(arguments.length, "--length")
        texts = [tokenize(file, outline.tokenizer) for file in files]
        if request.method != "window":
            divided(texts, request)
        model, _ = read_model(arguments.model, arguments.device_map, outline.tokenizer)
        with stage_display() as progress:
            topology = learn(model, texts, request, work=work, progress=progress, tokenizer=outline.tokenizer)
    if is_main_process():
        write_topology(topology, out)
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return _lines(topology, out, time.perf_counter() - started, arguments.json)


def _lines(topology: "Topology", out: Path, seconds: float, as_json: bool) -> Iterable[str]:
    from surgeon.compiler.topology.topology import mean_density

    seen, size = mean_density(topology), topology.block_size
    if as_json:
        made = {"path": str(out), "topology_sha256": topology.sha256, "density": seen, "seconds": round(seconds, 3)}
        return (json.dumps(made | {"provenance": dict(topology.provenance)}),)
    lines = [f"{out}: {topology.provenance['method']}, {seen:.1%} of the blocks of {size} tokens, {seconds:.0f} s"]
    if routes := topology.provenance.get("routes"):
        found = routes["validation"]
        lines.append(
            f"{routes['heads']} heads choose blocks by content; KL divergence from the dense model on validation text:"
            f" {found[routes['way']]:.4f} nats a token, with windows alone {found['windows']:.4f}"
        )
    if figures := topology.provenance.get("validation"):
        lines.append(
            f"KL divergence from the dense model on validation text{_counted(topology)}: {figures['divergence']:.4f}"
            f" nats a token, equal windows {figures['equal_windows']:.4f}"
        )
    return lines


def _counted(topology: "Topology") -> str:
    return ", of the tokens after a prompt" if topology.provenance.get("for") == "answers" else ""


LEARN = Command("learn", "Learn a topology from a frozen model and text.", _add_arguments, _run)
