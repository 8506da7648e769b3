"""The text that a topology is learned on: read, tokenized, and divided by use."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from surgeon.compiler.learn.texts.text_file import TextFile, read_text_file
from surgeon.runtime.errors import ModelError, reason_of, remedy_for


@dataclass(frozen=True)
class TokenText:
    """A text as token ids `[tokens]`, with its file's name and SHA-256."""

    name: str
    sha256: str
    tokens: torch.Tensor


@dataclass(frozen=True)
class Sequences:
    """Sequences `[1, length]` by use: no token is in two of them. `refine[r]` is for round r of the refinement.

    `cuts` is empty, or holds the sequences that cuts are proposed on and those that they are admitted on.
    """

    calibrate: tuple[torch.Tensor, ...]
    validate: tuple[torch.Tensor, ...]
    refine: tuple[tuple[torch.Tensor, ...], ...]
    cuts: tuple[tuple[torch.Tensor, ...], ...] = ()


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> TokenText:
    """Reads a UTF-8 text file and tokenizes it.

    Raises:
        ModelError: it cannot be read, is not text, or is empty.
    """
    return tokenize(read_text_file(path), tokenizer)


def tokenize(file: TextFile, tokenizer: PreTrainedTokenizerBase) -> TokenText:
    """Turns a text into tokens.

    Raises:
        ModelError: the tokenizer does not take it.
    """
    # The tokenizer warns about texts longer than the model's context; the model only gets sequences from them.
    try:
        ids = tokenizer(file.text, verbose=False)["input_ids"]
    except Exception as error:  # each kind of tokenizer raises classes of its own
        remedy = remedy_for(error, "name another text, or check the model's tokenizer")
        raise ModelError(file.name, "a text that the model's tokenizer reads", reason_of(error), remedy) from None
    return TokenText(file.name, file.sha256, torch.tensor(ids))


def divide(
    texts: Sequence[TokenText],
    length: int,
    calibrate: int,
    validate: int,
    refine: Sequence[int],
    seed: int,
    cuts: int = 0,
) -> Sequences:
    """Divides every text into sequences of `length` tokens and assigns them at random, reproducibly for a seed.

    The counts are per text. A text with too few sequences gives each use a share, and validation and calibration at
    least one; rounds of refinement that get none from any text fall back on the calibration sequences.

    Raises:
        ModelError: a text holds fewer than two sequences, or all of them too few for cuts.
    """
    rounds = [f"refine {index}" for index in range(len(refine))]
    uses = ["validate", "calibrate", *rounds, "propose", "admit"]
    wanted = [validate, calibrate, *refine, cuts, cuts]
    given: dict[str, list[torch.Tensor]] = {use: [] for use in uses}
    generator = torch.Generator().manual_seed(seed)
    for text in texts:
        count = len(text.tokens) // length
        if count < 2:
            raise ModelError(
                text.name,
                f"at least {2 * length} tokens: two sequences, one to learn on and one to validate on",
                f"{len(text.tokens)} tokens",
                "use a longer text, or a smaller length",
            )
        order = torch.randperm(count, generator=generator).tolist()
        for use, number in zip(uses, _shares(wanted, count), strict=True):
            for index in order[:number]:
                given[use].append(text.tokens[index * length : (index + 1) * length][None])
            del order[:number]
    if cuts and not given["admit"]:
        raise ModelError(
            "--cuts", f"{len(uses)} sequences of {length} tokens in a text", "fewer", "use longer texts, or no cuts"
        )
    return Sequences(
        calibrate=tuple(given["calibrate"]),
        validate=tuple(given["validate"]),
        refine=tuple(tuple(given[use]) or tuple(given["calibrate"]) for use in rounds),
        cuts=(tuple(given["propose"]), tuple(given["admit"])) if cuts else (),
    )


def spread(text: TokenText, length: int, count: int) -> list[torch.Tensor]:
    """Selects at most `count` sequences `[1, length]` from a text, not overlapping, spread evenly over it.

    Raises:
        ModelError: the text is shorter than one sequence.
    """
    available = len(text.tokens) // length
    if not available:
        raise ModelError(
            text.name,
            f"at least {length} tokens, one sequence",
            f"{len(text.tokens)} tokens",
            "use a longer text, or a smaller --length",
        )
    taken = min(count, available)
    starts = [index * available // taken * length for index in range(taken)]
    return [text.tokens[start : start + length][None] for start in starts]


def _shares(wanted: Sequence[int], available: int) -> list[int]:
    """Shares out sequences among the uses: one in turn to each that still needs one, the first uses first."""
    shares = [0] * len(wanted)
    while available and shares != list(wanted):
        for use in range(len(wanted)):
            if available and shares[use] < wanted[use]:
                shares[use] += 1
                available -= 1
    return shares
