"""Learns which heads bring back facts from afar: documents ─▶ gains of gates ─▶ heads."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore, Tensors
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.learn.routing.gates import GATES, Gains, Near, measure_gains, retrieval_scores
from surgeon.compiler.learn.routing.routed import NEAR_TOKENS, routed_places
from surgeon.compiler.learn.texts.documents import Document, document_of
from surgeon.compiler.system.terminal import Progress
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.evaluate.tasks.prompts import Encoder

_QUESTIONS = 320  # tokens at a document's end that ask and answer


@dataclass(frozen=True)
class Retrieval:
    """The heads that retrieve, and the number of documents that showed it.

    `agreement` is the share of these heads that each half of the documents finds by itself.
    """

    places: frozenset[tuple[int, int]]
    documents: int
    agreement: float


def retrieve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[torch.Tensor],
    grid: Grid,
    seed: int,
    store: CheckpointStore,
    identity: dict[str, object],
    progress: Progress | None,
) -> Retrieval:
    """Finds the heads that retrieve in documents made of sequences `[1, length]`, two of which are needed.

    Raises:
        ModelError: the sequences are too short to hide facts in.
    """
    encoder, drawn = Encoder(tokenizer), random.Random(seed)
    documents = [found for plain in sequences if (found := document_of(plain, encoder, drawn, _QUESTIONS)) is not None]
    if len(documents) < 2:
        raise ModelError(
            "--retrieve",
            "sequences that have room for hidden facts and questions",
            f"sequences of {sequences[0].shape[1]} tokens",
            "choose a larger --length or --measured-length",
        )
    near = Near(grid.block_size, grid.sink, max(1, max(NEAR_TOKENS) // grid.block_size))

    def measured(document: Document) -> Tensors:
        found = measure_gains(model, document, near)
        return {"mass": found.mass, **{f"gain {gate}": gain for gate, gain in zip(GATES, found.gains, strict=True)}}

    def find(number: int) -> Tensors:
        if progress is not None:
            progress("finding heads that retrieve", number, len(documents))
        step = {"step": "retrieve", "tokens": documents[number].tokens[0].tolist(), "near": vars(near)}
        return store.once(step | identity, lambda: measured(documents[number]))

    gains = [
        Gains(tuple(each[f"gain {gate}"] for gate in GATES), each["mass"])
        for each in processes_of(model).share(len(documents), find)
    ]
    places = routed_places(retrieval_scores(gains))
    halves = [routed_places(retrieval_scores(gains[half::2])) for half in range(2)]
    agreement = len(halves[0] & halves[1]) / max(1, len(places))
    return Retrieval(places, len(documents), agreement)
