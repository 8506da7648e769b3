"""The ops that say where each sequence stands."""

from collections.abc import Sequence

import pytest
import torch

from surgeon.runtime import masks
from surgeon.runtime.errors import PatchError


def first_key(rows: Sequence[str], position: int, length: int) -> torch.Tensor:
    mask = torch.tensor([[int(digit) for digit in row] for row in rows])
    found: torch.Tensor = torch.ops.surgeon.first_key(mask, torch.full((len(rows),), position), length)
    assert found.dtype == torch.int64
    return found


@pytest.mark.parametrize(
    ("rows", "position", "length", "expected"),
    [
        (["1111", "0111", "0001"], 0, 4, [0, 1, 3]),
        (["1111", "0111", "0000"], 3, 1, [0, 1, 4]),  # nothing valid yet: after all keys so far
        (["1100", "0110", "0010"], 0, 4, [0, 1, 2]),  # padding behind
        (["1100", "0100", "1101"], 0, 2, [0, 1, 0]),  # later keys are not there yet
        (["1"], 0, 1, [0]),
    ],
)
def test_first_key(rows: list[str], position: int, length: int, expected: list[int]) -> None:
    assert first_key(rows, position, length).tolist() == expected


@pytest.mark.parametrize("row", ["1011", "0101", "1001"])
def test_a_hole_is_refused(row: str) -> None:
    with pytest.raises(PatchError, match=r"attention_mask\[1\]: expected valid keys in one run"):
        first_key(["1111", row], 2, 2)


def test_a_short_mask_is_refused() -> None:
    with pytest.raises(PatchError, match=r"attention_mask: expected shape \[2, 5\].*got shape \[2, 4\]"):
        first_key(["1111", "1111"], 3, 2)


def test_the_ops_are_sound() -> None:
    """Schema, fake kernels and dynamic shapes, as torch checks them."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for dtype in (torch.int64, torch.bool, torch.float32):
        arguments = (mask.to(dtype), torch.tensor([1, 1]), 2)
        torch.library.opcheck(torch.ops.surgeon.first_key.default, arguments)
    torch.library.opcheck(torch.ops.surgeon.valid_keys.default, (mask, mask))
    torch.library.opcheck(torch.ops.surgeon.valid_keys.default, (mask, None))


def test_valid_keys() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert masks.valid_keys(ids, None).tolist() == [[True, True, True]]
    assert masks.valid_keys(ids, torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
