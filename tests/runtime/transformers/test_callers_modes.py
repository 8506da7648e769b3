"""What the caller has set for torch, a device, a dtype or a mode, changes nothing in a patched model on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from models import Compiled, padded
from surgeon.runtime import SurgeonCache, patch

Mode = Callable[[], AbstractContextManager[object]]


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Mode] = {
    "a device context": lambda: torch.device("meta"),
    "a default device": default_device,
    "a default dtype": default_dtype,
    "inference mode": torch.inference_mode,
}


def logits(model: LlamaForCausalLM, cache: object, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of the last token of a prompt, of a part of one and of a token after them."""
    ends = (100, 129, 130)
    found = []
    for begin, end in zip((0, *ends), ends, strict=False):
        # What the model makes of position ids by itself follows the caller's device, so they are given.
        places = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
        part = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places, past_key_values=cache)
        found.append(part.logits[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize("how", MODES)
@torch.no_grad()
def test_logits_do_not_change(model: LlamaForCausalLM, compiled: dict[str, Compiled], how: str) -> None:
    ids, mask = padded((130, 61, 117))
    package = compiled["sparse"].package
    patch(model, package, recall="pattern")
    expected = logits(model, SurgeonCache(package), ids, mask)
    with MODES[how]():
        assert torch.equal(logits(model, SurgeonCache(package), ids, mask), expected)


@pytest.mark.parametrize("how", MODES)
@torch.no_grad()
def test_a_layers_attention_does_not_change(compiled: dict[str, Compiled], how: str) -> None:
    package = compiled["sparse"].package
    q, k, v = torch.randn(3, 1, 4, 70, 32)
    expected = package.attention(0, q, k[:, :2], v[:, :2], position=0, cache_leftpad=0)
    with MODES[how]():
        assert torch.equal(package.attention(0, q, k[:, :2], v[:, :2], position=0, cache_leftpad=0), expected)
        assert torch.equal(package.attention(0, q, k[:, :2], v[:, :2]), expected)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=["in and out", "out and in"])
def test_a_cache_goes_on_in_another_mode(model: LlamaForCausalLM, compiled: dict[str, Compiled], first: Mode) -> None:
    ids, mask = padded((130, 61, 117))
    package = compiled["sparse"].package
    patch(model, package, recall="pattern")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=DynamicCache()).logits[:, 100:]
    cache = SurgeonCache(package)
    second: Mode = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with first():
        model(ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
    with second():
        found = model(ids[:, 100:], attention_mask=mask, past_key_values=cache).logits.clone()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    with first():  # what selecting and reordering do to what the other mode has made
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([5, 0, 1, 2, 3, 4]))
