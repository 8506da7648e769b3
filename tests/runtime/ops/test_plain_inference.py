"""Calls of attention that bypass torch's dispatcher, also if torch's private functions are missing."""

import pytest
import torch

from surgeon.runtime.ops import plain_inference
from surgeon.runtime.ops.plain_inference import is_plain_inference


def test_plain_tensors_in_inference_go_around_the_dispatcher() -> None:
    with torch.no_grad():
        assert is_plain_inference(torch.zeros(1), torch.zeros(1))


def test_what_torch_hooks_into_its_dispatcher_sees_the_call() -> None:
    tensor = torch.zeros(1)
    assert not is_plain_inference(torch.zeros(1, requires_grad=True))
    assert not is_plain_inference(torch.zeros(1, device="meta"))
    assert not is_plain_inference(tensor, torch.nn.Parameter(tensor, requires_grad=False))
    with torch.autocast("cpu"):
        assert not is_plain_inference(tensor)
    with torch.profiler.profile():
        assert not is_plain_inference(tensor)
    seen: list[bool] = []
    torch.func.vmap(lambda x: (seen.append(is_plain_inference(tensor)), x)[1])(torch.zeros(2))
    assert seen == [False]


def test_a_torch_without_one_of_its_private_functions_goes_through_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(plain_inference._HOOKS)
    assert plain_inference._hook("_no_such_function") is None
    assert plain_inference._hook("_no_such_module.function") is None
    monkeypatch.setattr(plain_inference, "_HOOKS", (*plain_inference._HOOKS, None))
    with torch.no_grad():
        assert not is_plain_inference(torch.zeros(1))
