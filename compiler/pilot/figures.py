"""The figures of a pilot that are relative to the dense model, which its table lists and its report draws."""

from dataclasses import dataclass
from typing import cast

from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot_file import Column


@dataclass(frozen=True)
class BesideDense:
    """A figure's name with its unit, its field of `AgainstDense`, and what it is for the dense model itself."""

    name: str
    field: str
    of_dense: float

    def of(self, column: Column) -> Estimate | None:
        """The figure of one of the pilot's models; None for the dense one."""
        return None if column.against_dense is None else cast(Estimate, getattr(column.against_dense, self.field))


PERPLEXITY_RATIO = BesideDense("perplexity, times dense", "perplexity_ratio", 1.0)
DIVERGENCE = BesideDense("KL from dense, nats a token", "divergence", 0.0)
LATE_DIVERGENCE = BesideDense("KL in the last quarter", "late_divergence", 0.0)
AGREEMENT = BesideDense("same first token", "agreement", 1.0)
FIRST_TOKEN_SPEEDUP = BesideDense("first token, times as fast", "first_token_speedup", 1.0)
DECODE_SPEEDUP = BesideDense("decoding, times as fast", "decode_speedup", 1.0)

ALL = (PERPLEXITY_RATIO, DIVERGENCE, LATE_DIVERGENCE, AGREEMENT, FIRST_TOKEN_SPEEDUP, DECODE_SPEEDUP)
