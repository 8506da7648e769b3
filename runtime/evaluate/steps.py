"""The steps of a long measurement, each of which may have been measured before."""

from collections.abc import Callable, Mapping, Sequence

Once = Callable[[Mapping[str, object], Callable[[], Sequence[float]]], Sequence[float]]
"""Returns the numbers of a step: those kept from before, or else those that the given function measures.

The step states everything that its numbers depend on, as JSON values.
"""


def anew(_step: Mapping[str, object], measure: Callable[[], Sequence[float]]) -> Sequence[float]:
    """Measures every step, and keeps nothing."""
    return measure()


def named(once: Once, **more: object) -> Once:
    """The same for steps that depend on more than they state: on a certain model, say."""
    return lambda step, measure: once({"step": step, "with": more}, measure)
