"""A pilot: compares models with the dense one on the same sequences in quality, retrieval, speed, memory and weights.

The models share one set of weights, so that a pilot needs little more memory than the model itself.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgeon.runtime.errors import ModelError, PackageError
from surgeon.runtime.evaluate.comparison import Comparison, compare
from surgeon.runtime.evaluate.estimates import Estimate, middle, ratio
from surgeon.runtime.evaluate.figures import AgainstDense
from surgeon.runtime.evaluate.passkeys import Passkey, Retrieval, retrieve
from surgeon.runtime.evaluate.pilot_file import Column, PasskeyCell
from surgeon.runtime.evaluate.processes import Processes, processes_of
from surgeon.runtime.evaluate.speed import Speed, measure_speed
from surgeon.runtime.loading import Package
from surgeon.runtime.transformers.cache import CACHE_NAME, SurgeonCache
from surgeon.runtime.transformers.fingerprint import fingerprint
from surgeon.runtime.transformers.offload import entry_device, weight_stores

Progress = Callable[[str, int, int], None]
_STEPS = 16  # tokens decoded per round, if the sequence is more than twice as long


@dataclass(frozen=True)
class Candidate:
    """A model to measure, the package that it is patched with (None for the dense model), and its density."""

    name: str
    model: PreTrainedModel
    package: Package | None
    density: float


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own config and modules that shares the weights, so that one of the two can be patched."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers(), *weight_stores(model))}
    return copy.deepcopy(model, shared)


def run_pilot(
    candidates: Sequence[Candidate],
    sequences: Sequence[torch.Tensor],
    passkeys: Sequence[Passkey],
    rounds: int,
    progress: Progress | None = None,
) -> tuple[Column, ...]:
    """Measures all candidates, the dense model first, on the same token ids `[1, length]`, all of one length.

    Where torch.distributed has several processes, they share sequences and passkeys. The main process measures the rest
    alone, so that speed is that of a machine without other work, and all processes return its findings.

    Raises:
        ModelError: a model is in training mode, or its figures are not finite.
    """
    dense, *others = candidates
    processes = processes_of(dense.model)
    report = progress or _silent
    comparisons = []
    for index, other in enumerate(others):
        report(f"quality: {other.name}", index, len(others))
        comparisons.append(compare(dense.model, other.model, sequences, processes))
        _check_finite(other, comparisons[-1])
    retrievals = _retrievals(candidates, passkeys, processes, report)

    def measured() -> tuple[Column, ...]:
        steps = min(_STEPS, sequences[0].shape[1] // 2)
        speeds = measure_speed({each.name: each.model for each in candidates}, sequences, steps, rounds, progress)
        columns = []
        for index, candidate in enumerate(candidates):
            report("cache and weights", index, len(candidates))
            found = comparisons[index - 1] if index else None
            kept = _kept_bytes(candidate, sequences[0])
            columns.append(_column(candidate, comparisons[0], found, retrievals[index], speeds, kept, dense.name))
        return tuple(columns)

    return processes.first(measured)


def _column(
    candidate: Candidate,
    reference: Comparison,
    found: Comparison | None,
    retrievals: Sequence[tuple[Passkey, Retrieval]],
    speeds: dict[str, Speed],
    kept_cache_bytes: int | None,
    dense: str,
) -> Column:
    """A candidate's column, from its comparison with the dense model; the dense model's own from any `reference`."""
    speed, dense_speed = speeds[candidate.name], speeds[dense]
    if found is None:
        losses = [each.dense_loss / each.tokens for each in reference.sequences]
        perplexity, beside = reference.dense_perplexity, None
    else:
        losses = [each.patched_loss / each.tokens for each in found.sequences]
        perplexity, beside = found.patched_perplexity, _beside(found, speed, dense_speed)
    hits = [float(retrieval.found) for _, retrieval in retrievals]
    return Column(
        name=candidate.name,
        topology_sha256=None if candidate.package is None else candidate.package.manifest.topology_sha256,
        density=candidate.density,
        losses=tuple(losses),
        perplexity=perplexity,
        against_dense=beside,
        passkeys=_cells(retrievals),
        passkeys_found=ratio(hits, [1.0] * len(hits)) if hits else None,
        first_token=middle(speed.first_token),
        decode=middle([1 / seconds for seconds in speed.decoded_token]),
        peak_bytes=speed.peak_bytes,
        kept_cache_bytes=kept_cache_bytes,
        weights_sha256=fingerprint(candidate.model),
    )


def _beside(found: Comparison, speed: Speed, dense: Speed) -> AgainstDense:
    return AgainstDense(
        perplexity_ratio=found.perplexity_ratio,
        divergence=found.divergence,
        late_divergence=found.late_divergence,
        agreement=found.agreement,
        first_token_speedup=_speedup(dense.first_token, speed.first_token),
        decode_speedup=_speedup(dense.decoded_token, speed.decoded_token),
    )


def _speedup(dense: Sequence[float], other: Sequence[float]) -> Estimate:
    """The median speed-up over the rounds, in each of which both read the same sequence."""
    return middle([before / after for before, after in zip(dense, other, strict=True)])


def _retrievals(
    candidates: Sequence[Candidate], passkeys: Sequence[Passkey], processes: Processes, report: Progress
) -> list[list[tuple[Passkey, Retrieval]]]:
    """Every task with its outcome, for each candidate."""
    rows = {}
    for item in processes.own(len(passkeys)):
        report("passkeys", item, len(passkeys))
        answers = [retrieve(candidate.model, passkeys[item]) for candidate in candidates]
        rows[item] = [number for answer in answers for number in (float(answer.found), answer.log_probability)]
    if not passkeys:
        return [[] for _ in candidates]
    table = processes.gather(rows, len(passkeys), 2 * len(candidates))
    return [
        [(task, Retrieval(bool(row[2 * index]), row[2 * index + 1])) for task, row in zip(passkeys, table, strict=True)]
        for index in range(len(candidates))
    ]


def _cells(retrievals: Sequence[tuple[Passkey, Retrieval]]) -> tuple[PasskeyCell, ...]:
    by_place: dict[tuple[int, float], list[Retrieval]] = {}
    for task, retrieval in retrievals:
        by_place.setdefault((task.length, task.depth), []).append(retrieval)
    return tuple(
        PasskeyCell(
            length=length,
            depth=depth,
            tried=len(found),
            found=sum(each.found for each in found),
            log_probability=math.fsum(each.log_probability for each in found) / len(found),
        )
        for (length, depth), found in by_place.items()
    )


@torch.inference_mode()
def _kept_bytes(candidate: Candidate, sequence: torch.Tensor) -> int | None:
    """Bytes that a cache holds once the sequence is read; None if no cache can drop blocks."""
    model, device = candidate.model, entry_device(candidate.model)
    if candidate.package is None:
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


def _check_finite(candidate: Candidate, found: Comparison) -> None:
    for index, each in enumerate(found.sequences):
        if not all(map(math.isfinite, (each.dense_loss, each.patched_loss, each.divergence))):
            raise ModelError(
                f"{candidate.name}: sequence {index}",
                "finite losses",
                f"{each.dense_loss} dense, {each.patched_loss} {candidate.name}",
                "check the model's weights and dtype",
            )


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
