"""The table of tiles: what it must hold for every target, and what follows from it."""

import json
from pathlib import Path

import pytest

import surgeon.compiler
from surgeon.compiler.specialize import HEAD_DIMS
from surgeon.compiler.tiles import MAX_READERS, Tile, decode_tile, device_of, padded, prefill_tile
from surgeon.runtime.errors import TargetError
from surgeon.runtime.target import Target

TABLE = json.loads((Path(surgeon.compiler.__file__).parent / "tiles.json").read_text())["targets"]


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_every_tile_is_one_that_a_kernel_can_have(name: str, head_dim: int, block_size: int) -> None:
    target = Target.parse(name)
    tile = prefill_tile(target, head_dim, block_size)
    assert power_of_two(tile.queries)
    assert power_of_two(tile.keys)
    assert power_of_two(tile.warps)
    assert tile.queries >= tile.keys
    assert max(1, tile.queries // block_size) * max(1, tile.keys // block_size) <= MAX_READERS
    assert tile.queries >= 8 * tile.warps
    assert tile.stages >= 1
    device = device_of(target)
    assert tile.warps * device.warp_size <= 1024
    keys_and_values = 2 * tile.stages * tile.keys * padded(head_dim) * 2
    assert keys_and_values <= device.shared_bytes


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads_per_kv_head", [1, 3, 16, 31])
def test_every_decoding_tile_holds_the_heads_of_a_kv_head(name: str, head_dim: int, heads_per_kv_head: int) -> None:
    target = Target.parse(name)
    for block_size in (16, 128):
        tile = decode_tile(target, head_dim, block_size, heads_per_kv_head)
        assert max(16, heads_per_kv_head) <= tile.queries <= 32
        assert power_of_two(tile.queries)
        assert power_of_two(tile.keys)
        assert tile.keys <= block_size
        assert 2 * tile.stages * tile.keys * padded(head_dim) * 2 <= device_of(target).shared_bytes


def test_a_tile_is_the_same_for_every_block_that_its_masks_have_bits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.parse("cuda:90")
    whole = Tile(queries=128, keys=64, warps=8, stages=3)
    assert {prefill_tile(target, 128, block_size) for block_size in (16, 32, 64, 128, 256)} == {whole}
    monkeypatch.setattr("surgeon.compiler.tiles.MAX_READERS", 4)
    assert prefill_tile(target, 128, 32) == Tile(queries=64, keys=64, warps=4, stages=3)
    assert prefill_tile(target, 128, 16) == Tile(queries=32, keys=32, warps=2, stages=3)


def test_a_block_that_no_matrix_instruction_takes() -> None:
    with pytest.raises(TargetError, match=r"block_size: expected at least 16 tokens for cuda:90.*, got 8; learn"):
        prefill_tile(Target.parse("cuda:90"), 128, 8)


def test_a_head_size_between_two_takes_the_larger_ones_tile() -> None:
    target = Target.parse("cuda:80")
    assert prefill_tile(target, 80, 128) == prefill_tile(target, 128, 128)
    assert prefill_tile(target, 16, 128) == prefill_tile(target, 64, 128)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"target cuda:61: expected cuda: with one of 80, 86, .*120, got 61; compile"):
        device_of(Target.parse("cuda:61"))


def test_a_head_size_that_no_tile_holds() -> None:
    with pytest.raises(TargetError, match=r"target cuda:90: expected a head size of at most 256, got 512; leave"):
        prefill_tile(Target.parse("cuda:90"), 512, 128)
