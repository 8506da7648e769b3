"""A pilot: compares models with the dense one on the same sequences in quality, retrieval, speed, memory and weights.

The models share one set of weights, so that a pilot needs little more memory than the model itself.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.runtime.errors import ModelError, PackageError
from surgeon.runtime.evaluate.continuation import Continued, compare_continued
from surgeon.runtime.evaluate.estimates import Estimate, middle
from surgeon.runtime.evaluate.pilot.figures import AgainstDense
from surgeon.runtime.evaluate.pilot.pilot_file import Column
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.evaluate.retrieval import Progress, Retrieval, mean_share, of_dense, retrieve
from surgeon.runtime.evaluate.speed import Speed, measure_speed
from surgeon.runtime.evaluate.steps import Once, anew, named
from surgeon.runtime.evaluate.tasks.prompts import Prompt
from surgeon.runtime.loading import Package
from surgeon.runtime.transformers.cache import CACHE_NAME, SurgeonCache
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.offload import entry_device, weight_stores

_STEPS = 16  # tokens decoded per round, if the sequence is more than twice as long
_CALL = 64  # tokens of a continuation that are read at a time, if all of them are rows that ask


@dataclass(frozen=True)
class Candidate:
    """A model to measure, the package and the recall that it is patched with, None for the dense one; its density."""

    name: str
    model: PreTrainedModel
    package: Package | None
    density: float
    recall: str | None = None
    dense_rows: int | None = None


@dataclass(frozen=True)
class PilotRun:
    """The measured columns, and the tasks behind their retrieval."""

    columns: tuple[Column, ...]
    retrieval: Retrieval


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own config and modules that shares the weights, so that one of the two can be patched."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers(), *weight_stores(model))}
    return copy.deepcopy(model, shared)


def run_pilot(
    candidates: Sequence[Candidate],
    sequences: Sequence[torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rounds: int,
    progress: Progress | None = None,
    once: Once = anew,
) -> PilotRun:
    """Measures all candidates, the dense model first, on the same token ids `[1, length]`, all of one length.

    Where torch.distributed has several processes, they share sequences and tasks. The main process measures the rest
    alone, so that speed is that of a machine without other work, and all processes return its findings. What is read
    and answered is measured in steps of `once`, which knows the weights and all that surrounds them; speed and memory
    are measured anew.

    Raises:
        ModelError: a model is in training mode, or its figures are not finite.
    """
    dense, *others = candidates
    models = [candidate.model for candidate in candidates]
    processes = processes_of(dense.model)
    report = progress or _silent
    step = min([_CALL, *(each.dense_rows for each in candidates if each.dense_rows)])
    described = [_described(candidate) for candidate in candidates]
    comparisons = compare_continued(models, sequences, step, processes, report, named(once, models=described))
    for other, found in zip(others, comparisons, strict=True):
        _check_finite(other, found)
    each_once = [named(once, model=each) for each in described]
    retrieval = retrieve(models, tokenizer, prompts, processes, report, each_once)

    def measured() -> tuple[Column, ...]:
        steps = min(_STEPS, sequences[0].shape[1] // 2)
        speeds = measure_speed({each.name: each.model for each in candidates}, sequences, steps, rounds, progress)
        columns = []
        for index, candidate in enumerate(candidates):
            report("cache and weights", index, len(candidates))
            found = comparisons[index - 1] if index else None
            kept = _kept_bytes(candidate, sequences[0])
            dense_speed = speeds[dense.name]
            columns.append(_column(candidate, comparisons[0], found, retrieval, index, speeds, dense_speed, kept))
        return tuple(columns)

    return PilotRun(processes.first(measured), retrieval)


def _described(candidate: Candidate) -> dict[str, object]:
    """Everything that tells a model's answers from those of another with the same weights."""
    package = None if candidate.package is None else candidate.package.id
    return {"package": package, "recall": candidate.recall, "dense_rows": candidate.dense_rows}


def _column(
    candidate: Candidate,
    reference: Continued,
    found: Continued | None,
    retrieval: Retrieval,
    index: int,
    speeds: dict[str, Speed],
    dense_speed: Speed,
    kept_cache_bytes: int | None,
) -> Column:
    """A candidate's column, from its comparison with the dense model; the dense model's own from any `reference`."""
    speed = speeds[candidate.name]
    if found is None:
        losses = [each.dense_loss / each.tokens for each in reference.prompt.sequences]
        perplexity, following = reference.prompt.dense_perplexity, reference.continuation.dense_perplexity
        beside = None
    else:
        losses = [each.patched_loss / each.tokens for each in found.prompt.sequences]
        perplexity, following = found.prompt.patched_perplexity, found.continuation.patched_perplexity
        beside = _beside(found, retrieval, index, speed, dense_speed)
    return Column(
        name=candidate.name,
        topology_sha256=None if candidate.package is None else candidate.package.manifest.topology_sha256,
        recall=candidate.recall,
        dense_rows=candidate.dense_rows,
        density=candidate.density,
        losses=tuple(losses),
        perplexity=perplexity,
        continuation_perplexity=following,
        against_dense=beside,
        scores=retrieval.scores[index],
        first_token=middle(speed.first_token),
        decode=middle([1 / seconds for seconds in speed.decoded_token]),
        peak_bytes=speed.peak_bytes,
        kept_cache_bytes=kept_cache_bytes,
        weights_sha256=fingerprint(candidate.model),
    )


def _beside(found: Continued, retrieval: Retrieval, index: int, speed: Speed, dense: Speed) -> AgainstDense:
    shares = of_dense(retrieval.questions, retrieval.scores[index], retrieval.scores[0])
    worst = min(shares, key=lambda task: shares[task].value, default=None)
    return AgainstDense(
        continuation_ratio=found.continuation.perplexity_ratio,
        continuation_divergence=found.continuation.divergence,
        continuation_agreement=found.continuation.agreement,
        retrieval=mean_share(shares.values()) if shares else None,
        worst_retrieval=None if worst is None else shares[worst],
        worst_task=worst,
        perplexity_ratio=found.prompt.perplexity_ratio,
        divergence=found.prompt.divergence,
        late_divergence=found.prompt.late_divergence,
        agreement=found.prompt.agreement,
        first_token_speedup=_speedup(dense.first_token, speed.first_token),
        decode_speedup=_speedup(dense.decoded_token, speed.decoded_token),
    )


def _speedup(dense: Sequence[float], other: Sequence[float]) -> Estimate:
    """The median speed-up over the rounds, in each of which both read the same sequence."""
    return middle([before / after for before, after in zip(dense, other, strict=True)])


@torch.inference_mode()
def _kept_bytes(candidate: Candidate, sequence: torch.Tensor) -> int | None:
    """Bytes that a cache holds once the sequence is read; None if no cache can drop blocks."""
    model, device = candidate.model, entry_device(candidate.model)
    if candidate.package is None or candidate.recall == "dense":  # rows that ask may read every block
        read = model(input_ids=sequence.to(device), use_cache=True, logits_to_keep=1)
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in read[CACHE_NAME].layers)
    if device.type != "cpu":
        return None
    try:
        cache = SurgeonCache(candidate.package)
    except PackageError:  # compiled by a version whose packages do not say when blocks may be dropped
        return None
    model(input_ids=sequence, **cache.argument, use_cache=True, logits_to_keep=1)
    return cache.kept_bytes()


def _check_finite(candidate: Candidate, found: Continued) -> None:
    for what, comparison in (("prompt", found.prompt), ("continuation", found.continuation)):
        for index, each in enumerate(comparison.sequences):
            if not all(map(math.isfinite, (each.dense_loss, each.patched_loss, each.divergence))):
                raise ModelError(
                    f"{candidate.name}: {what} {index}",
                    "finite losses",
                    f"{each.dense_loss} dense, {each.patched_loss} {candidate.name}",
                    "check the model's weights and dtype",
                )


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
