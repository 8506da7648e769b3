"""The time and memory that learning and assessing need, forecast from the time of one dense prompt.

The factors were measured with SmolLM2-135M at 2,048 tokens; those of Qwen2.5-Coder-0.5B are within a third of them.
`benchmarks/learning_cost.py` measures the sum.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgeon.compiler.learn.measure.attending import KEPT_BYTES, activation_bytes
from surgeon.compiler.learn.measure.decoder import LOGITS_CHUNK, dense_states
from surgeon.compiler.system.stages import Forecast, Stage

_CALIBRATE = 6.0
_ASSESS = 6.5
_VALIDATE = 1.6
_CHANGES = 4.5
_DESCEND = 10.5
_RETRIEVE = 5.0  # 6.3 with SmolLM2, 3.7 with Qwen
_ROUTES = 3  # windows alone, and two ways to route
_VALIDATE_ROUTES = 2.0
_TRIES = 5 / 3  # patterns that are validated in a round of refinement, between one and three
_BASE_BYTES = 0.7e9  # Python, torch and the texts
_LOGITS_ALIVE = 5.5  # tensors of a chunk's logits, their logarithms and their gradients


@dataclass(frozen=True)
class Counts:
    """Numbers of sequences by use, over all texts, as in `Sequences`.

    `calibrate` is 0 where windows are given. `descents` counts those of all training steps, `documents` those that
    heads that retrieve are found in, and `keys` those that the ranges of keys are measured on.
    """

    calibrate: int
    validate: int
    refine: tuple[int, ...]
    cuts: int = 0
    descents: int = 0
    documents: int = 0
    keys: int = 0


def learning_stages(counts: Counts, prompt_seconds: float) -> tuple[Stage, ...]:
    """The stages of learning windows, cuts and routes, where there are sequences for them, at the measured length.

    A sequence's dense states are computed once, with its first use at a sparse model.
    """
    stages: list[tuple[str, float]] = []
    if counts.calibrate:
        stages += [
            ("measuring what each window costs", counts.calibrate * _CALIBRATE),
            ("validating equal windows", counts.validate * (1 + _VALIDATE)),
            ("validating allocated windows", counts.validate * _VALIDATE),
        ]
    for number, fresh in enumerate(counts.refine, start=1):
        stages.append((f"refining windows, round {number}", fresh * (1 + _CHANGES)))
        stages.append((f"validating round {number}", counts.validate * _VALIDATE * _TRIES))
    if counts.cuts:
        stages.append(("looking for clusters", counts.cuts * (1 + _CHANGES)))
        stages.append(("comparing clusters with windows", counts.cuts * (1 + _CHANGES)))
        stages.append(("validating cuts", counts.validate * _VALIDATE * _TRIES))
    if counts.documents:
        stages.append(("finding heads that retrieve", counts.documents * _RETRIEVE))
    if counts.keys:
        stages.append(("measuring the ranges of keys", float(counts.keys)))
        dense = 0 if counts.calibrate else 1  # its states are known where windows were learned
        stages.append(("validating routes", counts.validate * (dense + _ROUTES * _VALIDATE_ROUTES)))
    return _timed(stages, prompt_seconds)


def descending_stages(counts: Counts, prompt_seconds: float) -> tuple[Stage, ...]:
    """The stages of learning p-adic paths by gradient descent."""
    stages = [
        ("descending the KL divergence", counts.descents * _DESCEND),
        ("lowering cuts", counts.calibrate * (1 + _CHANGES)),
        ("validating the learned trees", counts.validate * (1 + _VALIDATE)),
        ("validating equal windows", counts.validate * _VALIDATE),
    ]
    return _timed(stages, prompt_seconds)


def assessing_stages(counts: Counts, prompt_seconds: float) -> tuple[Stage, ...]:
    """The stages of an assessment."""
    stages = [
        ("measuring what each window costs", counts.calibrate * _ASSESS),
        ("validating equal windows", counts.validate * (1 + _VALIDATE)),
    ]
    return _timed(stages, prompt_seconds)


def learning_memory(config: PreTrainedConfig, parameters: int, length: int) -> float:
    """The peak memory in bytes of learning and of assessing on sequences of `length` tokens, in fp32."""
    kept = activation_bytes(config, length)
    if kept > KEPT_BYTES:  # then a layer's input is kept, and one layer at a time is computed again
        layers = config.num_hidden_layers
        kept = kept // layers + layers * length * config.hidden_size * 4
    logits = min(LOGITS_CHUNK, length) * config.get_text_config().vocab_size * 4
    return float(4 * parameters + _BASE_BYTES + kept + _LOGITS_ALIVE * logits)


def seconds_of_prompt(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """The time that the dense model takes to read a sequence `[1, length]`, where it lies."""
    started = time.perf_counter()
    dense_states(model, tokens)
    return time.perf_counter() - started


def forecast(stages: Sequence[Stage], model: PreTrainedModel, length: int) -> Forecast:
    """The forecast for a loaded model."""
    return Forecast(tuple(stages), learning_memory(model.config, model.num_parameters(), length))


def _timed(prompts: Sequence[tuple[str, float]], prompt_seconds: float) -> tuple[Stage, ...]:
    return tuple(Stage(name, number * prompt_seconds) for name, number in prompts)
