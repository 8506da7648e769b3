"""The tile table: its constraints on every target, and the tiles chosen from it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import surgeon.compiler
from surgeon.compiler.specs.specialize import HEAD_DIMS
from surgeon.compiler.specs.tiles import MAX_READERS, Tile, parse_tiles, read_tiles, tiles_json, tiles_of
from surgeon.compiler.system.powers import padded
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.target import Target

TABLE = json.loads((Path(surgeon.compiler.__file__).parent / "specs" / "tiles.json").read_text())["targets"]


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_every_tile_is_one_that_a_kernel_can_have(name: str, head_dim: int, block_size: int) -> None:
    target = Target.parse(name)
    tile = tiles_of(target).prefill_tile(head_dim, block_size)
    assert power_of_two(tile.queries)
    assert power_of_two(tile.keys)
    assert power_of_two(tile.warps)
    assert tile.queries >= tile.keys
    assert max(1, tile.queries // block_size) * max(1, tile.keys // block_size) <= MAX_READERS
    assert tile.queries >= 8 * tile.warps
    assert tile.stages >= 1
    device = tiles_of(target).device
    assert tile.warps * device.warp_size <= 1024
    keys_and_values = 2 * tile.stages * tile.keys * padded(head_dim) * 2
    assert keys_and_values <= device.shared_bytes


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads_per_kv_head", [1, 3, 16, 31])
def test_every_decoding_tile_holds_the_heads_of_a_kv_head(name: str, head_dim: int, heads_per_kv_head: int) -> None:
    target = Target.parse(name)
    for block_size in (16, 128):
        tile = tiles_of(target).decode_tile(head_dim, block_size, heads_per_kv_head)
        assert max(16, heads_per_kv_head) <= tile.queries <= 32
        assert power_of_two(tile.queries)
        assert power_of_two(tile.keys)
        assert tile.keys <= block_size
        assert 2 * tile.stages * tile.keys * padded(head_dim) * 2 <= tiles_of(target).device.shared_bytes


def test_a_tile_is_the_same_for_every_block_that_its_masks_have_bits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.parse("cuda:90")
    whole = Tile(queries=128, keys=64, warps=8, stages=3)
    assert {tiles_of(target).prefill_tile(128, block_size) for block_size in (16, 32, 64, 128, 256)} == {whole}
    monkeypatch.setattr("surgeon.compiler.specs.tiles.MAX_READERS", 4)
    assert tiles_of(target).prefill_tile(128, 32) == Tile(queries=64, keys=64, warps=4, stages=3)
    assert tiles_of(target).prefill_tile(128, 16) == Tile(queries=32, keys=32, warps=2, stages=3)


def test_a_tile_never_has_more_keys_than_queries() -> None:
    tiles = tiles_of(Target.parse("cuda:90")).with_tile("prefill", 128, Tile(queries=64, keys=128, warps=4, stages=2))
    assert tiles.prefill_tile(128, 128) == Tile(queries=64, keys=64, warps=4, stages=2)


def test_a_block_that_no_matrix_instruction_takes() -> None:
    with pytest.raises(TargetError, match=r"block_size: expected at least 16 tokens for cuda:90.*, got 8; learn"):
        tiles_of(Target.parse("cuda:90")).prefill_tile(128, 8)


def test_a_head_size_between_two_takes_the_larger_ones_tile() -> None:
    target = Target.parse("cuda:80")
    assert tiles_of(target).prefill_tile(80, 128) == tiles_of(target).prefill_tile(128, 128)
    assert tiles_of(target).prefill_tile(16, 128) == tiles_of(target).prefill_tile(32, 128)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"target cuda:61: expected cuda: with one of 80, 86, .*120, got 61; compile"):
        tiles_of(Target.parse("cuda:61"))


def test_a_head_size_that_no_tile_holds() -> None:
    with pytest.raises(TargetError, match=r"target cuda:90: expected a head size of at most 256, got 512; leave"):
        tiles_of(Target.parse("cuda:90")).prefill_tile(512, 128)


# Tables in files


def test_the_table_is_written_as_it_is_read() -> None:
    text = (Path(surgeon.compiler.__file__).parent / "specs" / "tiles.json").read_text()
    assert tiles_json(parse_tiles(text), json.loads(text)["source"]) == text


def test_another_tile_takes_the_place_of_one() -> None:
    own = tiles_of(Target.parse("cuda:90"))
    tile = Tile(queries=64, keys=32, warps=4, stages=2)
    changed = own.with_tile("prefill", 80, tile)
    assert changed.prefill_tile(128, 128) == tile
    assert changed.prefill_tile(64, 128) == own.prefill_tile(64, 128)
    assert changed.decode_tile(128, 128, 4) == own.decode_tile(128, 128, 4)
    assert parse_tiles(tiles_json({own.target: changed}, "a test")) == {own.target: changed}


def test_a_users_table_comes_first() -> None:
    target, other = Target.parse("cuda:90"), Target.parse("cuda:80")
    changed = tiles_of(target).with_tile("decode", 128, Tile(queries=16, keys=16, warps=2, stages=1))
    assert tiles_of(target, {target: changed}) is changed
    assert tiles_of(other, {target: changed}) is tiles_of(other)


def test_a_table_names_a_variant_where_it_is_not_the_default() -> None:
    own = tiles_of(Target.parse("cuda:90"))
    changed = own.with_tile("prefill", 128, Tile(128, 64, 8, 3, loads="descriptors"))
    assert changed.prefill_tile(128, 32).loads == "descriptors"
    text = tiles_json({own.target: changed}, "a test")
    assert "persistent" not in text
    assert text.count('"loads": "descriptors"') == text.count("loads") == 1
    assert parse_tiles(text) == {own.target: changed}


def test_persistent_programs_are_kept_whatever_the_heads() -> None:
    own = tiles_of(Target.parse("cuda:80"))
    changed = own.with_tile("prefill", 128, Tile(64, 64, 8, 3, heads=2, persistent=True))
    text = tiles_json({own.target: changed}, "a test")
    assert '"heads": 2, "persistent": true}' in text
    assert parse_tiles(text) == {own.target: changed}
    assert changed.prefill_tile(128, 128, 3) == Tile(128, 64, 8, 3, persistent=True)


def test_a_program_of_two_heads_has_as_many_rows_and_readers() -> None:
    own = tiles_of(Target.parse("cuda:90")).with_tile("prefill", 128, Tile(64, 64, 8, 3, heads=2))
    assert own.prefill_tile(128, 128, 4) == Tile(64, 64, 8, 3, heads=2)
    assert own.prefill_tile(128, 128, 3) == Tile(128, 64, 8, 3)  # two do not divide three
    assert own.prefill_tile(128, 16, 4) == Tile(64, 64, 8, 3, heads=2)  # 2 heads of 4 rows by 4 blocks: 32 bits
    wide = own.with_tile("prefill", 128, Tile(128, 64, 8, 3, heads=2))
    assert wide.prefill_tile(128, 16, 4) == Tile(64, 64, 4, 3, heads=2)


def test_only_a_target_with_a_copy_engine_has_descriptors() -> None:
    own = tiles_of(Target.parse("cuda:89"))
    changed = own.with_tile("prefill", 128, Tile(128, 64, 8, 3, loads="descriptors"))
    with pytest.raises(TargetError, match=r"cuda:89\.prefill\.128\.loads: expected pointers, got 'descriptors'"):
        parse_tiles(tiles_json({own.target: changed}, "a test"))


def change(document: Any, path: str, value: object) -> None:
    """Sets the value at a path of keys, or removes the last key if the value is None."""
    *above, last = path.split("/")
    for key in above:
        document = document[key]
    if value is None:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "tiles", r"tiles: format: expected 'surgeon.tiles', got 'tiles'"),
        ("version", 2, r"tiles: version: expected 1, got 2"),
        ("version", None, r"tiles: version: expected 1, got None"),
        ("more", 1, r"tiles: expected an object of source, targets, got"),
        ("targets", {}, r"tiles.targets: expected an object with a target, got \{\}"),
        ("targets/cuda:x", {}, r"target 'cuda:x': expected cpu, cuda:<compute capability>"),
        ("targets/cuda:90/warp_size", 48, r"cuda:90.warp_size: expected 32 or 64, got 48"),
        ("targets/cuda:90/shared_bytes", 0, r"cuda:90.shared_bytes: expected a whole number in 1..1048576, got 0"),
        ("targets/cuda:90/decode", None, r"targets.cuda:90: expected an object of decode, prefill"),
        ("targets/cuda:90/decode", {}, r"targets.cuda:90.decode: expected tiles by head size"),
        ("targets/cuda:90/prefill/100", {}, r"targets.cuda:90.prefill: expected tiles by head size, any of 16, 32"),
        ("targets/cuda:90/prefill/128/keys", 48, r"prefill.128.keys: expected a power of two, got 48"),
        ("targets/cuda:90/prefill/128/keys", 8, r"prefill.128.keys: expected at least 16 tokens, got 8"),
        ("targets/cuda:90/prefill/128/warps", True, r"prefill.128.warps: expected a whole number in 1..32, got True"),
        ("targets/cuda:90/prefill/128/stages", 2.0, r"prefill.128.stages: expected a whole number in 1..16, got 2.0"),
        ("targets/cuda:90/prefill/128/loads", "x", r"prefill.128.loads: expected pointers or descriptors, got 'x'"),
        ("targets/cuda:90/prefill/128/heads", 3, r"prefill.128.heads: expected 1 or 2, got 3"),
        ("targets/cuda:90/prefill/128/heads", True, r"prefill.128.heads: expected 1 or 2, got True"),
        ("targets/cuda:90/prefill/128/persistent", 1, r"prefill.128.persistent: expected false or true, got 1"),
        ("targets/cuda:90/decode/128/persistent", True, r"decode.128.persistent: expected false, got True"),
        ("targets/cuda:90/decode/128/heads", 2, r"decode.128.heads: expected 1, got 2"),
        ("targets/cuda:90/decode/128/loads", "descriptors", r"decode.128.loads: expected pointers, got 'descriptors'"),
        ("targets/cuda:90/prefill/128/queries", 512, r"prefill.128.queries: expected a whole number in 1..256"),
        ("targets/cuda:90/prefill/128/queries", None, r"prefill.128: expected an object of keys, queries, stages"),
    ],
)
def test_a_table_that_no_kernel_could_have(tmp_path: Path, path: str, value: object, message: str) -> None:
    target = Target.parse("cuda:90")
    document = json.loads(tiles_json({target: tiles_of(target)}, "a test"))
    change(document, path, value)
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(document))
    with pytest.raises(TargetError, match=rf"{re.escape(str(file))}: .*{message}"):
        read_tiles(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"\xff", "expected UTF-8 text"),
        (b"[]", r"tiles: expected an object, got \[\]"),
        (b" " * (2**20 + 1), "expected at most 1048576 bytes, got a larger file"),
        (None, "expected a readable file, got No such file or directory"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "tiles.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(TargetError, match=message):
        read_tiles(file)
