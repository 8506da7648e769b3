"""A pilot's findings as frozen dataclasses, with the writer and the strict reader of pilot.json, version 2.

Files of version 1 are read too, by `pilot_v1`.

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
from surgeon.runtime.evaluate.pilot.figures import LIMITS, AgainstDense
from surgeon.runtime.evaluate.pilot.pilot_v1 import upgraded
from surgeon.runtime.evaluate.retrieval import AskedQuestion, DroppedTask, mean_score
from surgeon.runtime.package.strict_json import Fault, parse_root, read_document, read_plain

MAX_PILOT_BYTES = 16 * 2**20

FAULT = Fault(PilotError, "run surgeon pilot again")
_FORMAT, _VERSION = "surgeon.pilot", 2


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
class Column:
    """One model's figures.

    `recall` and `dense_rows` are those of `patch`, None for the dense model. `density` is visible pairs over causal
    pairs of blocks at the pilot's length, under the pattern. `losses` are nats per token of each sequence's prompt, in
    the order of the texts, and `perplexity` is theirs; `continuation_perplexity` is that of the tokens that follow.
    `scores` are those of the pilot's questions, in their order, 0 to 1. `first_token` is in seconds for a prompt of
    nearly the pilot's length, `decode` in tokens per second after it. `peak_bytes` is the peak memory in use during
    both, None if the system does not tell. `kept_cache_bytes` is the size of the cache of a sequence, without dead
    blocks where kernels allow; None if unknown. `weights_sha256` is the weights' fingerprint after the run.
    """

    name: str
    topology_sha256: str | None
    recall: str | None
    dense_rows: int | None
    density: float
    losses: tuple[float, ...]
    perplexity: Estimate
    continuation_perplexity: Estimate | None
    against_dense: AgainstDense | None
    scores: tuple[float, ...]
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

    `questions` are those of the kept tasks, which every column has a score for. `seconds` are those of the run that
    wrote it, without what an interrupted one had done. `surgeon` is the version that made it, None in a file from
    before version 0.2.
    """

    model: str
    weights_sha256: str
    package_id: str
    length: int
    texts: tuple[PilotText, ...]
    machine: PilotMachine
    questions: tuple[AskedQuestion, ...]
    dropped_tasks: tuple[DroppedTask, ...]
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
        root = {"format": _FORMAT, "version": _VERSION}
        return json.dumps(root | dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def column(self, name: str) -> Column | None:
        """The column of this name, if the pilot has it."""
        return next((column for column in self.columns if column.name == name), None)

    def score(
        self,
        column: Column,
        task: str | None = None,
        length: int | None = None,
        asked: str | None = None,
        depth: float | None = None,
    ) -> Estimate | None:
        """A column's mean score on the questions with these properties, None standing for any; None without any."""
        wanted = {"task": task, "length": length, "asked": asked, "depth": depth}
        chosen = [
            (question, score)
            for question, score in zip(self.questions, column.scores, strict=True)
            if all(value is None or getattr(question, name) == value for name, value in wanted.items())
        ]
        if not chosen:
            return None
        questions, scores = zip(*chosen, strict=True)
        return mean_score(questions, scores)

    @classmethod
    def from_json(cls, text: str) -> "Pilot":
        """Reads the text of pilot.json.

        Raises:
            PilotError: the text is not JSON or is of another version, or a field is missing, unknown or of the wrong
                type.
        """
        version, root = parse_root(text, _FORMAT, (1, _VERSION), "pilot", FAULT)
        if version == 1:
            root = upgraded(root, FAULT)
        pilot = typing.cast(Pilot, read_plain(cls, root, "pilot", FAULT))
        if not pilot.columns or pilot.columns[0].against_dense is not None:
            raise FAULT("pilot: columns", "the dense model first", f"{len(pilot.columns)} others")
        if any(column.against_dense is None for column in pilot.columns[1:]):
            raise FAULT("pilot: columns", "figures beside the dense model in all but the first", "a column without")
        for index, column in enumerate(pilot.columns):
            if len(column.scores) != len(pilot.questions):
                where = f"pilot: columns[{index}]: scores"
                raise FAULT(where, f"{len(pilot.questions)}, one for each question", str(len(column.scores)))
        return pilot


def read_pilot(path: str | os.PathLike[str]) -> Pilot:
    """Reads and checks a file that `surgeon pilot` wrote.

    Raises:
        PilotError: the file is missing, too large, or breaks the format; the message says where.
    """
    return read_document(path, MAX_PILOT_BYTES, Pilot.from_json, FAULT)


def judged(found: AgainstDense, limits: Mapping[str, float | None]) -> tuple[Threshold, ...]:
    """Judges the patched model's figures by limits, named as in `LIMITS`; None stands for a limit that is not set.

    A figure that was not measured is not judged.
    """
    thresholds = []
    for figure, limit in limits.items():
        kind, estimate = LIMITS[figure], found.estimate(figure)
        if limit is not None and estimate is not None:
            name = f"{kind.name} {found.worst_task}" if figure == "worst_retrieval" else kind.name
            thresholds.append(Threshold(name, kind.bound, limit, estimate.value, kind.met(estimate.value, limit)))
    return tuple(thresholds)
