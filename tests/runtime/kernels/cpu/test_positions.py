"""Impossible positions and other numbers of a call: each is refused before a kernel can read by it."""

from typing import Any

import pytest
import torch

from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, SurgeonError, TopologyError
from surgeon.runtime.operands import Operands
from topologies import window_topology

LENGTH = 60
MOST = 2**63 - 1


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    topology = window_topology([1, 2], head_dim=32)
    return load(compile_package(topology, tmp_path_factory.mktemp("package") / "kernels"), strict=True)


def tensors(q_length: int = 1, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, batch, 1, LENGTH, 32)
    return torch.randn(batch, 2, q_length, 32), k, v


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"position": MOST}, TopologyError, "position ≤ 60 − 1"),
        ({"position": MOST, "cache_leftpad": MOST}, TopologyError, "position ≤ 60 − 1"),
        ({"position": MOST - 59, "cache_leftpad": MOST}, TopologyError, "position ≤ 60 − 1"),
        ({"position": torch.tensor([MOST])}, TopologyError, "position ≤ 60 − 1"),
        ({"position": torch.tensor([2**31 - 1], dtype=torch.int32)}, TopologyError, "position ≤ 60 − 1"),
        ({"position": LENGTH}, TopologyError, "position ≤ 60 − 1"),
        ({"position": -1}, TopologyError, "position ≤ 60 − 1"),
        ({"position": -(2**63)}, TopologyError, "position ≤ 60 − 1"),
        ({"cache_leftpad": -1}, TopologyError, "cache_leftpad ≥ 0"),
        ({"cache_leftpad": -(2**63)}, TopologyError, "cache_leftpad ≥ 0"),
        (
            {"position": 2**63},
            PatchError,
            r"position: expected an int or an integer tensor \[1\], got 9223372036854775808",
        ),
        ({"position": -(2**63) - 1}, PatchError, "position: expected an int"),
        ({"cache_leftpad": 2**64}, PatchError, "cache_leftpad: expected an int"),
        ({"position": 2.0}, PatchError, "position: expected an int .* got 2.0"),
        ({"position": "3"}, PatchError, "position: expected an int .* got '3'"),
        ({"position": True}, PatchError, "position: expected an int .* got True"),
        ({"position": [3]}, PatchError, r"position: expected an int .* got \[3\]"),
        ({"position": torch.tensor([3.0])}, PatchError, "position: expected an int .* got torch.float32"),
        ({"position": torch.tensor([True])}, PatchError, "position: expected an int .* got torch.bool"),
        ({"position": torch.tensor(3)}, PatchError, r"position: expected an int .* got torch.int64 \[\]"),
        ({"position": torch.tensor([3, 4])}, PatchError, r"position: expected an int .* got torch.int64 \[2\]"),
        (
            {"position": torch.tensor([5], device="meta")},
            PatchError,
            "position: expected an integer tensor on cpu, as q",
        ),
        (
            {"cache_leftpad": torch.tensor([0], device="meta")},
            PatchError,
            "cache_leftpad: expected an integer tensor on cpu",
        ),
        ({"scale": "x"}, PatchError, "scale: expected a finite number, got 'x'"),
        ({"scale": float("nan")}, PatchError, "scale: expected a finite number, got nan"),
        ({"scale": float("inf")}, PatchError, "scale: expected a finite number, got inf"),
        ({"scale": torch.tensor(0.5)}, PatchError, "scale: expected a finite number"),
    ],
    ids=str,
)
@pytest.mark.parametrize("q_length", [1, 40], ids=["decode", "prefill"])
def test_what_is_refused(
    package: Package, q_length: int, arguments: dict[str, Any], error: type[SurgeonError], message: str
) -> None:
    message = message.replace("60 − 1", f"60 − {q_length}")
    for attend in (package.attention, package.attention_with_lse):
        with pytest.raises(error, match=message):
            attend(0, *tensors(q_length), **arguments)


def test_a_fault_of_one_sequence_is_a_fault(package: Package) -> None:
    q, k, v = tensors(batch=2)
    assert package.attention(0, q, k, v, position=torch.tensor([59, 3])).isfinite().all()
    with pytest.raises(TopologyError, match=r"position \[59, 9223372036854775807\]"):
        package.attention(0, q, k, v, position=torch.tensor([59, MOST]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_no_tensor(package: Package, name: str) -> None:
    arguments: dict[str, Any] = dict(zip(("q", "k", "v"), tensors(), strict=True))
    with pytest.raises(PatchError, match=rf"attention: {name}: expected a tensor .* got \[1.0\]"):
        package.attention(0, **arguments | {name: [1.0]})
    with pytest.raises(PatchError, match=rf"attention: {name}: expected \["):
        package.attention(0, **arguments | {name: torch.tensor(1.0)})


def test_pages_behind_all_numbers(package: Package) -> None:
    slots = torch.zeros(4, 64, 32)
    block_table = torch.zeros(1, 1, 4, dtype=torch.int32)
    for position, cache_leftpad in ((MOST, MOST), (MOST, MOST - 3), (MOST, 0), (0, -MOST), (-MOST, 0)):
        operands = Operands(
            torch.zeros(1, 2, 1, 32), slots, slots, torch.tensor([position]), torch.tensor([cache_leftpad]), 0.5
        )
        with pytest.raises(TopologyError, match="position"):
            package.kernels.run_paged(0, operands, block_table)


def test_the_old_name_of_the_left_padding(package: Package) -> None:
    q, k, v = tensors(q_length=LENGTH)
    expected = package.attention(0, q, k, v, cache_leftpad=5)
    for attend in (package.attention, lambda *args, **named: package.attention_with_lse(*args, **named)[0]):
        with pytest.warns(DeprecationWarning, match="first_key is called cache_leftpad"):
            assert torch.equal(attend(0, q, k, v, first_key=5), expected)
    with (
        pytest.warns(DeprecationWarning, match="first_key"),
        pytest.raises(PatchError, match="attention: first_key: expected cache_leftpad alone, got both"),
    ):
        package.attention(0, q, k, v, cache_leftpad=5, first_key=5)
