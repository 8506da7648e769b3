"""Steps of a measurement that are kept in memory."""

import json
from collections.abc import Callable, Mapping, Sequence


class KeptSteps(dict[str, Sequence[float]]):
    """A `Once` that keeps what was measured, by the step's JSON."""

    def __call__(self, step: Mapping[str, object], measure: Callable[[], Sequence[float]]) -> Sequence[float]:
        spelled = json.dumps(step, sort_keys=True)
        if spelled not in self:
            self[spelled] = measure()
        return self[spelled]
