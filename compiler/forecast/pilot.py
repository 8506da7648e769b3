"""The time and memory that a pilot needs, forecast from the time of one dense prompt.

The counts are those of what `surgeon.runtime.evaluate.pilot.run` reads; the tokens of answers are left out.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from surgeon.compiler.system.stages import Forecast, Stage

_BASE_BYTES = 0.9e9  # Python, torch, and the activations and logits of a part of a prompt
_TASK_LENGTH = 0.75  # half of the prompts have half the length


def pilot_forecast(
    config: PreTrainedConfig,
    parameters: int,
    dense: float,
    others: Sequence[float],
    sequences: int,
    prompts: int,
    rounds: int,
    weight_bytes: int = 4,
) -> Forecast:
    """The forecast of a pilot of the dense model and others, on so many sequences and prompts of tasks.

    `dense` and `others` are the seconds that the models take for one prompt of the pilot's length; `weight_bytes` is
    the size of a weight.
    """
    reading = dense + sum(others)
    text = config.get_text_config()
    embedded = text.vocab_size * text.hidden_size
    head = dense * embedded / max(parameters - embedded, embedded)  # the logits of all positions
    stages = [Stage("prompts and continuations", sequences * (reading + 2 * head * (1 + len(others))))]
    if prompts:
        stages.append(Stage("tasks: dense", prompts * _TASK_LENGTH * dense))
        stages.append(Stage("tasks", prompts * _TASK_LENGTH * sum(others)))
    stages.append(Stage("speed", (rounds + 1) * reading))
    stages.append(Stage("cache and weights", reading))
    return Forecast(tuple(stages), weight_bytes * parameters + _BASE_BYTES)
