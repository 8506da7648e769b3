"""Tensors whose elements lie further apart than 32 bits count: views of memory that is reserved but never touched."""

from collections.abc import Sequence

import pytest
import torch

from models import Compiled
from surgeon.runtime import Package

pytestmark = pytest.mark.usefixtures("one_thread")

FAR = 2**31 + 4096
"""Elements, beyond what an int32 can count."""

Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def package(compiled: dict[str, Compiled]) -> Package:
    return compiled["sparse"].package


def reserved(*shape: int) -> torch.Tensor:
    """Memory of this many fp32 numbers, of which the system gives only the pages that are written."""
    try:
        return torch.empty(*shape)
    except RuntimeError:
        pytest.skip("the system reserves no memory that it may not have")


def spread(values: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The same values at these strides, of which one is far."""
    size = 1 + sum((count - 1) * stride for count, stride in zip(values.shape, strides, strict=True))
    assert size > FAR
    view = reserved(size).as_strided(values.shape, strides)
    return view.copy_(values)


STRIDES = {
    "sequences": ((FAR, 1280, 32, 1), (FAR, 1280, 32, 1)),
    "heads": ((4096, FAR // 3 + 1, 32, 1), (1280, FAR, 32, 1)),
    "tokens": ((128, 32, FAR // 39 + 1, 1), (64, 32, FAR // 39 + 1, 1)),
}


@pytest.mark.parametrize("apart", STRIDES)
@pytest.mark.parametrize("queries", [40, 1], ids=["prefill", "decode"])
def test_strides(package: Package, values: Values, apart: str, queries: int) -> None:
    q, k, v = values
    of_queries, of_keys = STRIDES[apart]
    expected = package.attention(0, q[:, :, -queries:], k, v)
    far = [spread(value, strides) for value, strides in zip(values, (of_queries, of_keys, of_keys), strict=True)]
    assert torch.equal(package.attention(0, far[0][:, :, -queries:], *far[1:]), expected)


def test_slots_of_a_pool(package: Package, values: Values) -> None:
    q, k, v = values
    slots = FAR // (16 * 32)
    pools = [reserved(slots + 12, 16, 32) for _ in range(2)]
    table = (torch.arange(12, dtype=torch.int32) * 7 % 12 + slots).view(2, 2, 3)
    for pool, states in zip(pools, (k, v), strict=True):
        blocks = torch.nn.functional.pad(states, (0, 0, 0, 8)).view(2, 2, 3, 16, 32)
        pool[table.long().flatten()] = blocks.flatten(0, 2)
    start = torch.zeros(2, dtype=torch.int64)
    found = torch.ops.surgeon.attention_paged(q, *pools, table, start, None, 32**-0.5, 0, 0, package.id, 0)
    torch.testing.assert_close(found, package.attention(0, q, k, v), atol=1e-6, rtol=0)
