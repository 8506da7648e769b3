"""A plan as lines for people: the gain, the cost, and a verdict."""

from collections.abc import Callable, Iterator

from surgeon.compiler.plan.estimate import Figure, Need, Plan
from surgeon.compiler.system.stages import duration
from surgeon.compiler.system.terminal import can_show

_GAINS = {1.2: "worth learning", 1.05: "a small gain"}
"""The words for a speed-up of the first token, by the least one that deserves them."""

_NOISE = 0.1  # of a speed-up; beyond this standard error the words would be guessed


def plan_lines(plan: Plan, threads: int, encoding: str) -> tuple[str, ...]:
    """Formats the plan, in ASCII if `encoding` has nothing more."""
    lines = (*_head(plan, threads), "", *_gain(plan), "", *_cost(plan), "", _verdict(plan))
    return lines if can_show(encoding, "±") else tuple(line.replace("±", "+-") for line in lines)


def _head(plan: Plan, threads: int) -> Iterator[str]:
    yield (
        f"{plan.model}: {plan.model_type}, {plan.layers} layers, {plan.parameters / 1e6:,.0f} million parameters; "
        f"fp32, {threads} CPU thread{'s' * (threads != 1)}"
    )
    yield (
        f"{plan.length:,} tokens, {plan.density:.1%} of the blocks of {plan.block_size}, recall {plan.recall}: "
        f"one layer of random weights, timed {plan.rounds} times, for all layers"
    )


def _gain(plan: Plan) -> Iterator[str]:
    yield f"{'':<26}{'dense':>10}{'patched':>10}   gain, times"
    yield _row("first token, s", plan.first_token, "{:.3f}")
    yield _row("  of it attention, s", plan.attention, "{:.3f}")
    yield _row("decoding, tokens/s", plan.decoded_token, "{:.1f}", lambda seconds: 1 / seconds)
    yield _row("cache kept, MB", plan.cache, "{:.1f}", lambda size: size / 1e6)


def _row(name: str, figure: Figure, pattern: str, shown: Callable[[float], float] = float) -> str:
    error = "" if figure.times.error is None else f" ± {figure.times.error:.2f}"
    values = (pattern.format(shown(each.value)) for each in (figure.dense, figure.patched))
    return f"{name:<26}{''.join(f'{value:>10}' for value in values)}   {figure.times.value:.2f}{error}"


def _cost(plan: Plan) -> Iterator[str]:
    yield f"{f'with {plan.texts} texts, about':<26}{'time':>10}{'memory':>10}"
    for name, need in (("assess", plan.assess), ("learn", plan.learn), ("pilot", plan.pilot)):
        yield _needed(f"surgeon {name}", need)


def _needed(name: str, need: Need) -> str:
    return f"{name:<26}{duration(need.seconds):>10}{f'{need.memory_bytes / 1e9:.1f} GB':>10}"


def _verdict(plan: Plan) -> str:
    times = plan.first_token.times.value
    gain = next((words for least, words in _GAINS.items() if times >= least), "little to gain")
    if (plan.first_token.times.error or 0.0) > _NOISE:
        gain = "too noisy to tell, so ask again when the machine has nothing else to do"
    sentence = (
        f"{gain}: the first token {times:.2f} times as fast; attention is "
        f"{plan.attention_share.value:.0%} of it, so no pattern makes it more than {plan.bound.value:.2f} times as fast"
    )
    if plan.even_length <= plan.length:
        return sentence
    beyond = plan.context is not None and plan.even_length > plan.context
    context = f", beyond the model's context of {plan.context:,}" if beyond else ""
    return f"{sentence}; at about {plan.even_length:,} tokens{context}, attention is half"
