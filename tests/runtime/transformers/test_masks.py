"""The ops that find each sequence's position and padding."""

from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function

from models import VOCABULARY, Compiled, tiny_llama
from no_waiting import HostWaits, NoWaiting
from surgeon.runtime import patch
from surgeon.runtime.errors import PatchError
from surgeon.runtime.ops import input_checks
from surgeon.runtime.transformers import masks


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the op run its GPU implementation, wherever its tensors are."""
    monkeypatch.setattr(torch.ops.surgeon, "cache_leftpad", input_checks._cache_leftpad_on_gpu)


def cache_leftpad(rows: Sequence[str], position: int, length: int) -> torch.Tensor:
    mask = torch.tensor([[int(digit) for digit in row] for row in rows])
    found: torch.Tensor = torch.ops.surgeon.cache_leftpad(mask, torch.full((len(rows),), position), length)
    assert found.dtype == torch.int64
    return found


CASES = [
    (["1111", "0111", "0001"], 0, 4, [0, 1, 3]),
    (["1111", "0111", "0000"], 3, 1, [0, 1, 4]),  # nothing valid yet: after all keys so far
    (["1100", "0110", "0010"], 0, 4, [0, 1, 2]),  # padding on the right
    (["1100", "0100", "1101"], 0, 2, [0, 1, 0]),  # later keys do not exist yet
    (["1"], 0, 1, [0]),
]


@pytest.mark.parametrize(("rows", "position", "length", "expected"), CASES)
def test_first_key(rows: list[str], position: int, length: int, expected: list[int]) -> None:
    assert cache_leftpad(rows, position, length).tolist() == expected


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("rows", "position", "length", "expected"), CASES)
def test_on_a_gpu_the_first_key_is_found_without_waiting(
    rows: list[str], position: int, length: int, expected: list[int]
) -> None:
    with NoWaiting():
        found = cache_leftpad(rows, position, length)
    assert found.tolist() == expected


def test_sequences_stand_where_they_stand() -> None:
    """A static cache that holds sequences of different lengths: the keys after each do not exist yet."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    found = torch.ops.surgeon.cache_leftpad(mask, torch.tensor([2, 0]), 2)
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize("row", ["1011", "0101", "1001"])
def test_a_hole_is_refused(row: str) -> None:
    with pytest.raises(PatchError, match=r"attention_mask\[1\]: expected valid keys in one run"):
        cache_leftpad(["1111", row], 2, 2)


def test_a_short_mask_is_refused() -> None:
    with pytest.raises(PatchError, match=r"attention_mask: expected shape \[2, 5\].*got shape \[2, 4\]"):
        cache_leftpad(["1111", "1111"], 3, 2)


@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_a_bad_mask_stops_the_device() -> None:
    """The fault is torch's own assertion for devices; on a CPU, as here, it is an error at once."""
    with pytest.raises(RuntimeError, match=r"attention_mask: expected valid keys in one run, got masked keys between"):
        cache_leftpad(["1111", "1011"], 2, 2)
    with pytest.raises(RuntimeError, match=r"attention_mask: expected the cached tokens, then the new ones"):
        cache_leftpad(["1111", "1111"], 3, 2)
    with pytest.raises(PatchError, match=r"attention_mask: expected shape \[1, 2\].*got shape \[2, 4\]"):
        torch.ops.surgeon.cache_leftpad(torch.ones(2, 4), torch.tensor([2]), 2)


def test_a_mask_that_is_too_short_is_refused_before_any_device_knows() -> None:
    with pytest.raises(PatchError, match=r"expected shape \[2, 9\].*got shape \[2, 8\]"):
        masks.placement(
            batch_size=2,
            q_length=1,
            kv_length=16,
            q_offset=8,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=torch.ones(2, 8, dtype=torch.bool, device="meta"),
            device=torch.device("meta"),
        )


@pytest.mark.usefixtures("on_gpu", "one_thread")
@pytest.mark.parametrize("static", [False, True])
def test_a_patched_model_on_a_gpu_never_waits(
    compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    """Prefill and a decoding step of a padded batch, on tensors without values."""
    monkeypatch.setattr("surgeon.runtime.transformers.compatibility._check_kernels", lambda *_: None)
    with torch.device("meta"):
        model = tiny_llama()
        patch(model, compiled["sparse"].package, recall="pattern")
        cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        mask = torch.ones(2, 9, dtype=torch.long)
        with NoWaiting(), torch.no_grad():
            model(input_ids=torch.ones(2, 8, dtype=torch.long), attention_mask=mask[:, :8], past_key_values=cache)
            out = model(input_ids=torch.ones(2, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
        assert (out.logits.device.type, out.logits.shape) == ("meta", (2, 1, VOCABULARY))
        with NoWaiting(), pytest.raises(HostWaits):  # the same mask, checked as on a CPU
            input_checks._cache_leftpad(mask, torch.zeros(2, dtype=torch.long), 9)


def test_the_ops_are_sound() -> None:
    """Torch's own checks of schema, fake kernels and dynamic shapes."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for dtype in (torch.int64, torch.bool, torch.float32):
        arguments = (mask.to(dtype), torch.tensor([1, 1]), 2)
        torch.library.opcheck(torch.ops.surgeon.cache_leftpad.default, arguments)
    torch.library.opcheck(torch.ops.surgeon.valid_keys.default, (mask, mask))
    torch.library.opcheck(torch.ops.surgeon.valid_keys.default, (mask, None))


def test_valid_keys() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert input_checks.valid_keys(ids, None).tolist() == [[True, True, True]]
    assert input_checks.valid_keys(ids, torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
