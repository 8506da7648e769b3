"""Extrapolates the times of one layer to the whole model, and to what assessing, learning and piloting cost."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from surgeon.compiler.forecast.learning import Counts, assessing_stages, learning_memory, learning_stages
from surgeon.compiler.forecast.pilot import pilot_forecast
from surgeon.compiler.learn.learn import Effort
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.plan.layer import PlannedModel
from surgeon.compiler.plan.measure import Call, LayerTimes
from surgeon.compiler.system.stages import Forecast
from surgeon.runtime.evaluate.estimates import Estimate, middle

TEXTS = 3
"""The texts that assessing, learning and piloting are planned for."""
_SEQUENCES, _PROMPTS, _ROUNDS = 4 * TEXTS, 56, 5  # a pilot's defaults
_MODELS = 3  # beside the dense one: patched, by the pattern alone, and with equal windows
_LEAST_SECONDS = 1e-6


@dataclass(frozen=True)
class Figure:
    """A figure of the dense model and of the patched one, and how many times the dense one is as slow or as large."""

    dense: Estimate
    patched: Estimate
    times: Estimate


@dataclass(frozen=True)
class Need:
    """The time in seconds and the peak memory in bytes that a command takes."""

    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Plan:
    """The expected gain of equal windows over the dense model, and the cost of finding better ones.

    `first_token` and `attention`, which is within it, are in seconds, `decoded_token` in seconds per token,
    `cache` in bytes after a prompt. `attention_share` is of the dense first token; `bound` is the speed-up of the first
    token if attention took no time. From about `even_length` tokens on, attention takes half of the first token.
    """

    model: str
    model_type: str
    layers: int
    parameters: int
    length: int
    block_size: int
    density: float
    recall: str
    rounds: int
    first_token: Figure
    attention: Figure
    decoded_token: Figure
    cache: Figure
    attention_share: Estimate
    bound: Estimate
    even_length: int
    context: int | None
    texts: int
    assess: Need
    learn: Need
    pilot: Need


def plan_of(planned: PlannedModel, grid: Grid, times: LayerTimes) -> Plan:
    """The plan for a model, from the times of one of its layers."""
    config: PreTrainedConfig = planned.config
    layers = config.num_hidden_layers
    prompts = {name: _whole_model(calls, layers) for name, calls in times.prompts.items()}
    steps = {name: _whole_model(calls, layers) for name, calls in times.steps.items()}
    length = grid.blocks * grid.block_size
    dense, patched, bare = (prompts[name] for name in ("dense", "patched", "bare"))
    first_token, rest = _figure(dense, patched), middle(bare)
    own, ours = _beyond(first_token.dense, rest), _beyond(first_token.patched, rest)
    prompt = first_token.dense.value
    effort = Effort()
    counts = Counts(
        TEXTS * effort.calibrate, TEXTS * effort.validate, tuple(TEXTS * number for number in effort.refine)
    )
    once = Counts(TEXTS, TEXTS, ())
    memory = learning_memory(config, planned.parameters, length)
    ours_s = first_token.patched.value
    pilot = pilot_forecast(config, planned.parameters, prompt, (ours_s,) * _MODELS, _SEQUENCES, _PROMPTS, _ROUNDS)
    return Plan(
        model=planned.name,
        model_type=config.model_type,
        layers=layers,
        parameters=planned.parameters,
        length=length,
        block_size=grid.block_size,
        density=times.density,
        recall=times.recall,
        rounds=len(dense),
        first_token=first_token,
        attention=Figure(own, ours, Estimate(own.value / ours.value, None)),
        decoded_token=_figure(steps["dense"], steps["patched"]),
        cache=_figure([layers * float(times.dense_cache_bytes)], [layers * float(times.kept_cache_bytes)]),
        attention_share=Estimate(own.value / first_token.dense.value, None),
        bound=_quotient(dense, bare),
        # Attention grows with the square of the length, the rest with the length.
        even_length=round(length * rest.value / own.value),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        texts=TEXTS,
        assess=_need(Forecast(assessing_stages(once, prompt), memory)),
        learn=_need(Forecast(learning_stages(counts, prompt), memory)),
        pilot=_need(pilot),
    )


def _whole_model(calls: tuple[Call, ...], layers: int) -> list[float]:
    """The seconds of a model with so many equal layers, in each round."""
    return [call.whole + (layers - 1) * call.layer for call in calls]


def _beyond(whole: Estimate, rest: Estimate) -> Estimate:
    """The seconds of the whole beyond the rest, more than none; of two medians, which noise disturbs least."""
    return Estimate(max(whole.value - rest.value, _LEAST_SECONDS), None)


def _figure(dense: list[float], patched: list[float]) -> Figure:
    return Figure(middle(dense), middle(patched), _quotient(dense, patched))


def _quotient(above: list[float], below: list[float]) -> Estimate:
    """The quotient of the medians; its error is that over the rounds, in each of which both were measured in turn."""
    error = middle([one / other for one, other in zip(above, below, strict=True)]).error
    return Estimate(middle(above).value / middle(below).value, error)


def _need(forecast: Forecast) -> Need:
    return Need(forecast.seconds, forecast.memory_bytes)
