"""A pilot's findings as frozen dataclasses, with the writer and the strict reader of pilot.json, version 1.

The columns are the models that were measured side by side on the same sequences: the dense one first, then the others.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.runtime.errors import PilotError
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.figures import LIMITS, AgainstDense
from surgeon.runtime.package.strict_json import Fault, parse_root, read_document, read_plain

MAX_PILOT_BYTES = 16 * 2**20

_FAULT = Fault(PilotError, "run surgeon pilot again")
_ROOT = {"format": "surgeon.pilot", "version": 1}


@dataclass(frozen=True)
class PilotText:
    """A text, by its file's name and SHA-256, and the number of sequences taken from it."""

    name: str
    sha256: str
    sequences: int


@dataclass(frozen=True)
class PilotMachine:
    """The machine that the pilot ran on, and the time; `threads` are torch's."""

    processor: str
    device: str
    dtype: str
    threads: int
    torch: str
    transformers: str
    date: str


@dataclass(frozen=True)
class PasskeyCell:
    """Numbers hidden at one depth of prompts of one length, in tokens.

    `depth` is the share of the filler before the number. Greedy decoding would write `found` of the `tried` numbers
    exactly; `log_probability` is that of the right tokens, in nats per token.
    """

    length: int
    depth: float
    tried: int
    found: int
    log_probability: float


@dataclass(frozen=True)
class Column:
    """One model's figures.

    `density` is visible pairs over causal pairs of blocks at the pilot's length. `losses` are nats per token of each
    sequence, in the order of the texts. `first_token` is in seconds for a prompt of nearly the pilot's length, `decode`
    in tokens per second after it. `peak_bytes` is the peak memory in use during both, None if the system does not tell.
    `kept_cache_bytes` is the size of the cache of a sequence, without dead blocks where kernels allow; None if unknown.
    `weights_sha256` is the weights' fingerprint after the run.
    """

    name: str
    topology_sha256: str | None
    density: float
    losses: tuple[float, ...]
    perplexity: Estimate
    against_dense: AgainstDense | None
    passkeys: tuple[PasskeyCell, ...]
    passkeys_found: Estimate | None
    first_token: Estimate
    decode: Estimate
    peak_bytes: int | None
    kept_cache_bytes: int | None
    weights_sha256: str

    def beside_dense(self, figure: str) -> Estimate | None:
        """The figure of this field of `AgainstDense`; None for the dense model."""
        return None if self.against_dense is None else self.against_dense.estimate(figure)


@dataclass(frozen=True)
class Threshold:
    """A limit for a figure of the patched model, `bound` "at most" or "at least", and whether it is met."""

    figure: str
    bound: str
    limit: float
    found: float
    met: bool


@dataclass(frozen=True)
class Pilot:
    """A whole pilot; `length` is in tokens, `weights_sha256` is the fingerprint from before anything ran.

    `surgeon` is the version that made it, None in a file from before version 0.2.
    """

    model: str
    weights_sha256: str
    package_id: str
    length: int
    texts: tuple[PilotText, ...]
    machine: PilotMachine
    columns: tuple[Column, ...]
    thresholds: tuple[Threshold, ...]
    seconds: float
    surgeon: str | None = None

    @property
    def weights_unchanged(self) -> bool:
        """True if every column ended with the weights that the pilot began with."""
        return all(column.weights_sha256 == self.weights_sha256 for column in self.columns)

    @property
    def passed(self) -> bool:
        """True if every threshold is met and no weight has changed."""
        return self.weights_unchanged and all(threshold.met for threshold in self.thresholds)

    def to_json(self) -> str:
        """The text of pilot.json, the same for equal pilots."""
        return json.dumps(_ROOT | dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Pilot":
        """Reads the text of pilot.json.

        Raises:
            PilotError: the text is not JSON or is of another version, or a field is missing, unknown or of the wrong
                type.
        """
        root = {"surgeon": None} | parse_root(text, _ROOT, "pilot", _FAULT)
        pilot = typing.cast(Pilot, read_plain(cls, root, "pilot", _FAULT))
        if not pilot.columns or pilot.columns[0].against_dense is not None:
            raise _FAULT("pilot: columns", "the dense model first", f"{len(pilot.columns)} others")
        if any(column.against_dense is None for column in pilot.columns[1:]):
            raise _FAULT("pilot: columns", "figures beside the dense model in all but the first", "a column without")
        return pilot


def read_pilot(path: str | os.PathLike[str]) -> Pilot:
    """Reads and checks a file that `surgeon pilot` wrote.

    Raises:
        PilotError: the file is missing, too large, or breaks the format; the message says where.
    """
    return read_document(path, MAX_PILOT_BYTES, Pilot.from_json, _FAULT)


def judged(found: AgainstDense, limits: Mapping[str, float | None]) -> tuple[Threshold, ...]:
    """Judges the patched model's figures by limits, named as in `LIMITS`; None stands for a limit that is not set."""
    thresholds = []
    for figure, limit in limits.items():
        kind, value = LIMITS[figure], found.estimate(figure).value
        if limit is not None:
            thresholds.append(Threshold(kind.name, kind.bound, limit, value, kind.met(value, limit)))
    return tuple(thresholds)
