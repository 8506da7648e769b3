"""The fingerprint depends on every bit of the weights and on nothing else."""

import hashlib

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from models import tiny_config, tiny_llama
from surgeon.runtime import fingerprint
from surgeon.runtime.errors import ModelError


def test_the_definition() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2, bias=False)).to(torch.bfloat16)
    lines = []
    for name, shape in (("0.bias", "2"), ("0.weight", "2x3"), ("1.weight", "2")):
        bits = model.get_parameter(name).detach().view(torch.int16).numpy().astype("<i2").tobytes()
        lines.append(f"{name} bfloat16 {shape} {hashlib.sha256(bits).hexdigest()}\n")
    assert fingerprint(model) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_one_bit_of_any_parameter_counts() -> None:
    model = tiny_llama(tiny_config(num_hidden_layers=1))
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        bits = parameter.detach().view(torch.int32).view(-1)
        bits[-1] ^= 1
        seen.add(fingerprint(model))
        bits[-1] ^= 1
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint(model) in seen


def test_names_dtypes_and_shapes_count() -> None:
    zeros = torch.zeros(4)
    named = [("a", zeros), ("b", zeros), ("a", zeros.view(2, 2)), ("a", zeros[:3]), ("a", zeros.to(torch.int32))]
    seen = set()
    for name, value in named:
        model = torch.nn.Module()
        model.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        seen.add(fingerprint(model))
    assert len(seen) == len(named)


def test_strides_gradients_and_buffers_do_not_count() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    plain = torch.nn.ParameterDict({"a": torch.nn.Parameter(values, requires_grad=False)})
    strided = torch.nn.ParameterDict({"a": torch.nn.Parameter(values.t().contiguous().t())})
    strided.register_buffer("b", torch.ones(2))
    assert fingerprint(strided) == fingerprint(plain)


def test_tied_weights_count_under_both_names() -> None:
    model = tiny_llama(tiny_config(tie_word_embeddings=True))
    untied = tiny_llama(tiny_config())
    untied.load_state_dict(model.state_dict())
    assert fingerprint(untied) == fingerprint(model)


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="bias: expected a parameter in memory, got one on the meta device; load"):
        fingerprint(model)


def test_a_weight_made_of_several_tensors_counts_by_these() -> None:
    """Torchao keeps its numbers and scales in such a tensor subclass, whose own memory cannot be read."""

    def of(scale: float) -> str:
        model = torch.nn.Linear(2, 2, bias=False)
        weight = TwoTensor(torch.ones(2, 2), torch.full((2, 2), scale))
        model.weight = torch.nn.Parameter(weight, requires_grad=False)
        return fingerprint(model)

    assert of(0.5) == of(0.5) != of(0.25)
