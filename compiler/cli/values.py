"""Types of argument values, and the arguments that several commands share."""

import argparse
import json
import math
from pathlib import Path


def add_model_and_text(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments for a model, its devices and texts."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, or a name that Transformers can resolve")
    parser.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help="devices for the model, as in from_pretrained: auto, a device, or a JSON object; default: the CPU,"
        " or for a pilot the package's device",
    )
    parser.add_argument(
        "--text", action="append", required=True, type=path, metavar="FILE", help="UTF-8 text; repeatable"
    )


def add_measured(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments for a model, texts, and the sequences that the model is measured on."""
    add_model_and_text(parser)
    parser.add_argument("--length", type=positive, default=2048, metavar="TOKENS", help="default: 2048")
    parser.add_argument(
        "--measured-length",
        type=positive,
        metavar="TOKENS",
        help="measure sequences of this length and scale the windows to --length; default: --length",
    )
    add_block(parser)
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")


def add_block(parser: argparse.ArgumentParser) -> None:
    """Declares `--block`; without it, a command takes `reach.suited_block`."""
    parser.add_argument(
        "--block",
        type=positive,
        metavar="TOKENS",
        help="default: 64, 32 or 16, the largest of which a row reads six on average",
    )


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Declares `--jobs`, and says at the end of the help where compiled parts are cached."""
    parser.epilog = (
        "Compiled parts are cached in ~/.cache/surgeon/compiled, or in $SURGEON_CACHE/compiled, and not compiled again."
        " The cache takes at most 1 GB, or $SURGEON_CACHE_SIZE: for example 500M or 2G, or 0 for no limit."
    )
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="compilers to run at once; default: one per processor"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declares `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parses a whole number of at least 0."""
    return _whole(text, 0)


def density(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def ratio(text: str) -> float:
    """Parses a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def number(text: str) -> float:
    """Parses a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def device_map(text: str) -> str | dict[str, str | int]:
    """Parses a name for the whole model's device, or a JSON object with a device for each module."""
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


def path(text: str) -> Path:
    """Parses a path; refuses an empty one, as an unset shell variable yields."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # NaN compares false with everything
