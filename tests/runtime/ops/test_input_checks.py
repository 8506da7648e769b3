"""The op that checks the inputs of a serving step; the ops that read masks are tested with the masks."""

from typing import Any

import pytest
import torch

from surgeon.runtime.errors import PatchError
from surgeon.runtime.ops import input_checks

IDS, POSITION, CACHE = torch.ones(2, 3, dtype=torch.int64), torch.tensor([4, 0]), torch.zeros(2, 1, 7, 4)


def step(
    ids: torch.Tensor = IDS,
    position: torch.Tensor = POSITION,
    kept: torch.Tensor = POSITION,
    cache: torch.Tensor = CACHE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The arguments of `cache_slots`, valid by default."""
    return ids, position, kept, [CACHE, cache]


def test_cache_slots() -> None:
    assert input_checks.cache_slots(*step()).tolist() == [[4, 5, 6], [0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (step(position=torch.tensor([5, 0])), r"position: expected 3 new .* the cache's 7, got positions \[5, 0\]"),
        (step(position=torch.tensor([0, -1])), r"position: expected 3 new .* the cache's 7, got positions \[0, -1\]"),
        (step(position=POSITION[:1]), r"position: expected torch.int64 \[2\], contiguous, got torch.int64 \[1\]"),
        (step(position=POSITION.int()), r"position: expected torch.int64 .*got torch.int32"),
        (step(kept=POSITION[None]), r"kept: expected torch.int64 \[2\], contiguous, got torch.int64 \[1, 2\]"),
        (step(ids=IDS.T.contiguous().T), r"input_ids: .*got torch.int64 \[2, 3\], not contiguous; .*\.contiguous\(\)"),
        (step(cache=CACHE[:, :, :6]), r"cache: expected .* \[2, 1, 7, 4\], contiguous, got .* \[2, 1, 6, 4\]"),
        (step(cache=CACHE[:1]), r"cache: expected .* \[2, 1, 7, 4\], contiguous, got .* \[1, 1, 7, 4\]"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        input_checks.cache_slots(*arguments)


def test_the_op_is_sound() -> None:
    torch.library.opcheck(torch.ops.surgeon.cache_slots.default, step())
