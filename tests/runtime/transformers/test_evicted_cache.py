"""A cache from which others have taken keys is refused: positions say more tokens than it holds.

Eviction methods (StreamingLLM, those of kvpress) take keys out of a DynamicCache and count positions on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from models import Compiled, masked_model, padded, tiny_llama, tokens
from no_waiting import NoWaiting
from surgeon.runtime import SurgeonCache, patch
from surgeon.runtime.errors import PatchError
from surgeon.runtime.transformers import masks

pytestmark = pytest.mark.usefixtures("no_gradients")

REFUSED = r"position_ids\[\d, -1\]: expected at most \d+, since the cache holds \d+ keys, got \d+; keep every key"


@pytest.fixture
def patched(model: LlamaForCausalLM, compiled: dict[str, Compiled]) -> LlamaForCausalLM:
    patch(model, compiled["sparse"].package, recall="pattern")
    return model


def filled(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> DynamicCache:
    cache = DynamicCache()
    model(ids, attention_mask=mask, position_ids=positions(mask, ids), past_key_values=cache)
    return cache


def positions(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """As generate() counts them."""
    return (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp(min=0)


def thinned(cache: DynamicCache, keep: Sequence[int] | torch.Tensor) -> DynamicCache:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    return cache


def streaming(length: int) -> list[int]:
    """The first tokens and the latest."""
    return [token for token in range(length) if token < 4 or token >= length - 24]


def pressed(length: int) -> list[int]:
    """A part of the tokens from everywhere, as a press keeps those of high scores."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[: length // 2].sort().values.tolist()


def one(length: int) -> list[int]:
    return [token for token in range(length) if token != length // 2]


@pytest.mark.parametrize("keep", [streaming, pressed, one])
@pytest.mark.parametrize("new", [1, 7])
def test_a_thinned_cache_is_refused(patched: LlamaForCausalLM, keep: Callable[[int], list[int]], new: int) -> None:
    ids = tokens(2, 60 + new)
    cache = thinned(filled(patched, ids[:, :60]), keep(60))
    with pytest.raises(PatchError, match=REFUSED):
        patched(ids[:, 60:], past_key_values=cache, position_ids=torch.arange(60, 60 + new)[None])


def test_a_padded_batch_is_refused_by_its_own_padding(patched: LlamaForCausalLM) -> None:
    """Fewer keys are missing than there is padding, so that the count of all keys alone would not tell."""
    ids, mask = padded((61, 41))
    shorter = torch.cat((mask[:, :30], mask[:, 32:]), dim=1)
    for row, places in ((0, [[60], [40]]), (1, [[58], [40]])):
        cache = filled(patched, ids[:, :60], mask[:, :60])
        thinned(cache, [token for token in range(60) if token not in (30, 31)])
        call = {"attention_mask": shorter, "past_key_values": cache, "position_ids": torch.tensor(places)}
        with pytest.raises(PatchError, match=rf"position_ids\[{row}, -1\]: .* holds 58 keys, got {places[row][0]}"):
            patched(ids[:, 60:], **call)


def test_it_is_checked_once_a_pass(patched: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    equal = torch.Tensor.__or__
    monkeypatch.setattr(torch.Tensor, "__or__", lambda *pair: (checks.append(1), equal(*pair))[1])
    patched(tokens(1, 20), use_cache=False)
    once = len(checks)
    patched(tokens(1, 20), use_cache=False)
    assert 0 < len(checks) == 2 * once <= 2 * 4


@pytest.mark.parametrize("surgeon_cache", [False, True])
@pytest.mark.parametrize("count", ["with the padding", "without the padding", "by the model"])
def test_either_way_to_count_is_taken(
    patched: LlamaForCausalLM, compiled: dict[str, Compiled], count: str, surgeon_cache: bool
) -> None:
    """Prompts in parts, the first of them all padding for the shorter sequence, and tokens one by one."""
    ids, mask = padded((80, 31))
    places: dict[str, Any] = {
        "with the padding": torch.arange(80)[None],
        "without the padding": positions(mask, ids),
        "by the model": None,
    }
    package = compiled["sparse"].package
    cache = SurgeonCache(package) if surgeon_cache else DynamicCache()
    expected = masked_model(tiny_llama(), compiled["sparse"].topology)(ids, attention_mask=mask).logits
    for begin, end in ((0, 20), (20, 48), (48, 75), (75, 76), (76, 80)):
        given = None if places[count] is None else places[count][:, begin:end]
        call = {"attention_mask": mask[:, :end], "position_ids": given, "past_key_values": cache}
        found = patched(ids[:, begin:end], **call).logits
        real = mask[:, begin:end].bool()
        torch.testing.assert_close(found[real], expected[:, begin:end][real], atol=5e-5, rtol=0)


def test_sequences_that_start_at_another_position_are_taken(
    patched: LlamaForCausalLM, compiled: dict[str, Compiled]
) -> None:
    """Rotary positions are relative; only what a cache holds is compared."""
    ids = tokens(1, 40)
    expected = masked_model(tiny_llama(), compiled["sparse"].topology)(ids).logits
    for places in (torch.arange(100, 140)[None], torch.arange(7, 47)[None].expand(1, -1)):
        torch.testing.assert_close(patched(ids, position_ids=places).logits, expected, atol=1e-4, rtol=0)


def test_the_check_does_not_wait_for_a_gpu() -> None:
    """Tensors on the meta device have no values to wait for."""
    with torch.device("meta"):
        placement = torch.zeros(2, 1, 2, 60, dtype=torch.int64)
        with NoWaiting():
            masks.check_positions(torch.arange(60)[None], 60, masks.unpack(placement, 60))
