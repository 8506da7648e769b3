"""The time and memory that a pilot needs, forecast from the time of one dense prompt.

The counts are those of what `surgeon.runtime.evaluate.pilot` reads; three pilots of SmolLM2-135M took within a fifth.
"""

from collections.abc import Callable

from transformers import PreTrainedConfig

from surgeon.compiler.system.stages import Forecast, Stage

_BASE_BYTES = 0.9e9  # Python, torch, and the activations and logits of a part of a prompt
_PASSKEY_LENGTH = 0.75  # half of them have half the length


def pilot_forecast(
    config: PreTrainedConfig,
    parameters: int,
    seconds: Callable[[str], float],
    others: tuple[str, ...],
    sequences: int,
    passkeys: int,
    rounds: int,
    weight_bytes: int = 4,
) -> Forecast:
    """The forecast of a pilot of the dense model and `others`.

    `seconds` tells the time of one prompt of the pilot's length by the model's name, "dense" or one of the others;
    `weight_bytes` is the size of a weight.
    """
    dense, each = seconds("dense"), [seconds(name) for name in others]
    reading = dense + sum(each)
    text = config.get_text_config()
    embedded = text.vocab_size * text.hidden_size
    head = dense * embedded / max(parameters - embedded, embedded)  # the logits of all positions
    stages = [
        Stage(f"quality: {name}", sequences * (dense + other + 2 * head))
        for name, other in zip(others, each, strict=True)
    ]
    if passkeys:
        stages.append(Stage("passkeys", passkeys * _PASSKEY_LENGTH * reading))
    stages.append(Stage("speed", (rounds + 1) * reading))
    stages.append(Stage("cache and weights", reading))
    return Forecast(tuple(stages), weight_bytes * parameters + _BASE_BYTES)
