"""The figures of a model relative to the dense one: one table for pilot.json, tables, plots and thresholds."""

from dataclasses import dataclass, field, fields
from typing import Any, cast

from surgeon.runtime.evaluate.estimates import Estimate


@dataclass(frozen=True)
class Limit:
    """A limit that may be set for a figure: its name in a verdict, and `bound`, "at most" or "at least"."""

    name: str
    bound: str

    def met(self, value: float, limit: float) -> bool:
        """Returns whether a value keeps to the limit."""
        return value <= limit if self.bound == "at most" else value >= limit


@dataclass(frozen=True)
class RelativeFigure:
    """The presentation of a figure: its name with its unit, the dense model's own value, and its number format.

    In a table it stands below `follows`, a field of `Column`; `by_density` puts it in the table of several pilots too.
    """

    name: str
    of_dense: float
    pattern: str
    follows: str
    by_density: bool = True
    limit: Limit | None = None


def _shown(*appearance: Any, **more: Any) -> dict[str, RelativeFigure]:
    return {"figure": RelativeFigure(*appearance, **more)}


_PERPLEXITY = Limit("perplexity of the continuation, times dense", "at most")
_DIVERGENCE = Limit("divergence of the continuation, nats a token", "at most")
_RETRIEVAL = Limit("retrieval, times dense, of the task", "at least")
_SPEEDUP = Limit("speed-up of the first token", "at least")


@dataclass(frozen=True)
class AgainstDense:
    """A column relative to the dense one on the same sequences; a speed-up above 1 is faster than dense.

    Divergences are KL(dense ‖ column) in nats per token; agreement is the share of tokens where both rank the same
    token first. The prompt is what is read at once, its late part the last quarter; the continuation is what follows.
    Retrieval is over the kept tasks, None without any; `worst_task` is the one of `worst_retrieval`.
    """

    continuation_ratio: Estimate | None = field(
        metadata=_shown(
            "continuation: perplexity, times dense", 1.0, "{:.4f}", "continuation_perplexity", limit=_PERPLEXITY
        )
    )
    continuation_divergence: Estimate | None = field(
        metadata=_shown(
            "continuation: KL from dense, nats a token", 0.0, "{:.5f}", "continuation_perplexity", limit=_DIVERGENCE
        )
    )
    continuation_agreement: Estimate | None = field(
        metadata=_shown("continuation: most likely next token agrees", 1.0, "{:.2%}", "continuation_perplexity")
    )
    retrieval: Estimate | None = field(metadata=_shown("retrieval, times dense", 1.0, "{:.2f}", "scores"))
    worst_retrieval: Estimate | None = field(
        metadata=_shown("retrieval, times dense, worst task", 1.0, "{:.2f}", "scores", limit=_RETRIEVAL)
    )
    worst_task: str | None
    perplexity_ratio: Estimate = field(metadata=_shown("prompt: perplexity, times dense", 1.0, "{:.4f}", "perplexity"))
    divergence: Estimate = field(metadata=_shown("prompt: KL from dense, nats a token", 0.0, "{:.5f}", "perplexity"))
    late_divergence: Estimate = field(
        metadata=_shown("prompt: KL in the last quarter", 0.0, "{:.5f}", "perplexity", by_density=False)
    )
    agreement: Estimate = field(metadata=_shown("prompt: most likely next token agrees", 1.0, "{:.2%}", "perplexity"))
    first_token_speedup: Estimate = field(
        metadata=_shown("first token, times as fast", 1.0, "{:.2f}", "first_token", limit=_SPEEDUP)
    )
    decode_speedup: Estimate = field(metadata=_shown("decoding, times as fast", 1.0, "{:.2f}", "decode"))

    def estimate(self, figure: str) -> Estimate | None:
        """The value of a figure by its field."""
        return cast(Estimate | None, getattr(self, figure))


FIGURES: dict[str, RelativeFigure] = {
    each.name: each.metadata["figure"] for each in fields(AgainstDense) if "figure" in each.metadata
}
"""All figures, by their fields of `AgainstDense`, in the order of a table."""
LIMITS: dict[str, Limit] = {name: figure.limit for name, figure in FIGURES.items() if figure.limit}
"""The limits that may be set, by the figures' fields."""
