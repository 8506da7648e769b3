"""The parts of the GPU benchmark that need no GPU: preparing its packages, its check, and the peer's mask."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import gpu
import reference
from inputs import topologies as patterns
from measure.checked import WrongResultError, checked
from surgeon.runtime.package.reader import read_package

SHAPE = patterns.Shape(heads=4, kv_heads=2, head_dim=64, block_size=128)
LENGTH = 1024


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHAPE", SHAPE)
    monkeypatch.setattr(gpu, "DENSITIES", (0.5,))
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)


def test_packages_are_compiled_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    command = ["gpu.py", "--packages", str(tmp_path), "--compile", "cuda:90", "--lengths", str(LENGTH)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    folder = gpu.place(tmp_path, patterns.windows(SHAPE, LENGTH, 0.5))
    assert capsys.readouterr().out == f"{folder}\n"
    assert read_package(folder).manifest.targets == ("cuda:90",)


@pytest.mark.parametrize("q_length", [LENGTH, 1])
def test_the_check_takes_what_is_right_and_nothing_else(q_length: int) -> None:
    topology = patterns.windows(SHAPE, LENGTH, 0.5)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, SHAPE.heads, q_length, SHAPE.head_dim, generator=generator)
    k, v = torch.randn(2, 1, SHAPE.kv_heads, LENGTH, SHAPE.head_dim, generator=generator)
    mask = torch.from_numpy(topology.block_mask(0, LENGTH // SHAPE.block_size))
    expected, _ = reference.attention(topology, 0, q, k, v)
    checked("the reference", mask, SHAPE.block_size, (q, k, v), expected)
    with pytest.raises(WrongResultError, match="nonsense: expected a relative error below"):
        checked("nonsense", mask, SHAPE.block_size, (q, k, v), expected * 1.1)


@pytest.mark.parametrize("q_length", [LENGTH, 1])
def test_the_peer_reads_the_same_blocks(q_length: int) -> None:
    topology = patterns.windows(SHAPE, LENGTH, 0.5)
    mask = torch.from_numpy(topology.block_mask(0, LENGTH // SHAPE.block_size))
    q, k, v = (torch.zeros(1, heads, length, 64) for heads, length in ((4, q_length), (2, LENGTH), (2, LENGTH)))
    call = gpu.flexible(mask, (q, k, v))
    assert isinstance(call, partial)
    block_mask = call.keywords["block_mask"]
    rows = mask if q_length > 1 else mask[:, -1:]
    assert torch.equal(block_mask.to_dense()[0].bool(), rows)
    assert block_mask.kv_num_blocks.unique().tolist() == [1]  # only the diagonal is masked
    assert block_mask.seq_lengths == (q_length, LENGTH)
    inside = block_mask.mask_mod(0, 0, torch.tensor(q_length - 1), torch.arange(LENGTH))
    assert inside.all()
    assert int(block_mask.mask_mod(0, 0, torch.tensor(0), torch.arange(LENGTH)).sum()) == LENGTH - q_length + 1
