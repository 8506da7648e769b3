"""What argparse must know of each command, and the kinds of values that the arguments take."""

import argparse
import json
import math
from pathlib import Path

from surgeon.runtime.package.target import DTYPES


def compile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon compile` takes."""
    parser.add_argument("topology", metavar="topology.json", help="the learned topology")
    parser.add_argument("--out", required=True, type=_path, metavar="FOLDER", help="the package to make or to replace")
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="cpu, cuda:<compute capability> or hip:<gfx name>, for instance cuda:90; repeatable; default: cpu",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="repeatable; default: every dtype that each target takes"
    )
    _add_jobs(parser)
    parser.add_argument("--tiles", type=_path, metavar="FILE", help="a table of GPU tiles, as surgeon tune writes it")
    parser.add_argument("--dump", type=_path, metavar="FOLDER", help="write the product of every stage there")
    _add_json(parser)


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon inspect` takes."""
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a topology file or a package")
    _add_json(parser)


def _add_model_and_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or a name that Transformers knows")
    parser.add_argument(
        "--device-map",
        type=_device_map,
        metavar="MAP",
        help="where the model goes, as from_pretrained takes it: auto, a device, or a JSON object; default: the CPU,"
        " or for a pilot where the package runs",
    )
    parser.add_argument(
        "--text", action="append", required=True, type=_path, metavar="FILE", help="UTF-8 text; repeatable"
    )


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """What to measure a frozen model on."""
    _add_model_and_text(parser)
    parser.add_argument("--length", type=_positive, default=2048, metavar="TOKENS", help="default: 2048")
    parser.add_argument("--block", type=_positive, default=64, metavar="TOKENS", help="default: 64")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="default: 0")


def assess_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon assess` takes."""
    _add_measured(parser)
    parser.add_argument(
        "--density", type=_density, default=0.25, help="visible share of the block pairs to assess at; default: 0.25"
    )
    parser.add_argument("--work", type=_path, metavar="FOLDER", help="where finished steps are kept; default: nowhere")
    _add_json(parser)


def learn_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon learn` takes."""
    _add_measured(parser)
    parser.add_argument(
        "--density", required=True, type=_density, help="visible share of the block pairs, for instance 0.25"
    )
    parser.add_argument("--out", required=True, type=_path, metavar="topology.json", help="the file to write")
    parser.add_argument(
        "--measured-length",
        type=_positive,
        metavar="TOKENS",
        help="learn on sequences of this length and scale the windows to --length; default: --length",
    )
    parser.add_argument(
        "--method",
        choices=("budget", "ultrametric", "window"),
        default="budget",
        help="ultrametric: trees by gradient descent; window: equal windows; default: budget",
    )
    parser.add_argument("--steps", type=_positive, default=60, metavar="N", help="steps of ultrametric; default: 60")
    parser.add_argument(
        "--batch", type=_positive, default=1, metavar="N", help="sequences of a step of ultrametric; default: 1"
    )
    parser.add_argument(
        "--arity", type=int, choices=(2, 3, 5, 7), default=2, help="of ultrametric's digits; default: 2"
    )
    parser.add_argument(
        "--cuts", action="store_true", help="also try clusters; a head gets one where it pays on text not used for it"
    )
    parser.add_argument(
        "--work",
        type=_path,
        metavar="FOLDER",
        help="where finished steps are kept, so that the same command continues an interrupted run; default: a folder"
        " beside --out, removed at the end",
    )
    _add_json(parser)


def pilot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon pilot` takes."""
    _add_model_and_text(parser)
    parser.add_argument("package", type=_path, metavar="PACKAGE", help="the kernel package to try")
    parser.add_argument("--out", type=_path, default=Path("pilot.json"), metavar="FILE", help="default: pilot.json")
    parser.add_argument("--length", type=_positive, metavar="TOKENS", help="default: the topology's own")
    parser.add_argument(
        "--sequences", type=_positive, default=4, metavar="N", help="sequences of each text, spread over it; default: 4"
    )
    parser.add_argument(
        "--passkeys",
        type=_natural,
        default=2,
        metavar="N",
        help="numbers to be found, for each of five depths and two lengths; default: 2",
    )
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="of timing; default: 5")
    parser.add_argument("--no-window", action="store_true", help="leave out the model with equal windows")
    parser.add_argument(
        "--max-ppl-ratio", type=_ratio, metavar="X", help="exit with 3 where perplexity over dense is above this"
    )
    parser.add_argument(
        "--min-speedup", type=_ratio, metavar="X", help="exit with 3 where the first token's speed-up is below this"
    )
    _add_json(parser)


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon report` takes."""
    parser.add_argument("pilot", type=_path, metavar="pilot.json", help="what surgeon pilot wrote")
    parser.add_argument("topology", type=_path, metavar="topology.json", help="the topology that was tried")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        type=_path,
        metavar="pilot.json",
        help="a pilot of another topology on the same model and texts, for the curves; repeatable",
    )
    parser.add_argument("--out", type=_path, default=Path("report.html"), metavar="FILE", help="default: report.html")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon export` takes."""
    parser.add_argument("package", metavar="PACKAGE", help="the kernel package")
    parser.add_argument("--format", required=True, choices=("hf-kernels",), help="hf-kernels: for get_local_kernel")
    parser.add_argument("--out", required=True, type=_path, metavar="FOLDER", help="the folder to make or to replace")
    _add_json(parser)


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `surgeon tune` takes."""
    parser.add_argument("topology", metavar="topology.json", help="the topology whose schedules are timed")
    parser.add_argument("--out", required=True, type=_path, metavar="FILE", help="the table of tiles to write")
    parser.add_argument("--layer", type=_natural, default=0, metavar="N", help="the layer that is timed; default: 0")
    parser.add_argument(
        "--head-dim",
        action="append",
        type=_positive,
        metavar="N",
        help="a head size to choose tiles for; repeatable; default: the topology's own",
    )
    parser.add_argument("--tiles", type=_path, metavar="FILE", help="a table to start from, instead of Surgeon's own")
    _add_jobs(parser)
    _add_json(parser)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What has been compiled is kept in ~/.cache/surgeon/compiled, or below $SURGEON_CACHE, and not compiled again."
        " It takes 1 GB at most, or what $SURGEON_CACHE_SIZE says: 500M, 2G, or 0 for no limit."
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="compilers at once; default: one a processor")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _device_map(text: str) -> str | dict[str, str | int]:
    if not text.startswith("{"):
        return text
    try:
        places: dict[str, str | int] = json.loads(text)
    except (ValueError, RecursionError):
        places = {}
    if not places or not all(isinstance(place, str | int) for place in places.values()):
        raise argparse.ArgumentTypeError(
            f"expected a name, or a JSON object with a device for each module, got {text!r}"
        )
    return places


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)
