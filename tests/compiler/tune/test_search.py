"""Candidates and the choice among them; the clock is a function of the tiles."""

import dataclasses
from collections.abc import Callable

import pytest

from surgeon.compiler.specs.tiles import TargetTiles, Tile, parse_tiles, tiles_json, tiles_of
from surgeon.compiler.tune.candidates import decode_candidates, prefill_candidates
from surgeon.compiler.tune.search import Trial, tune
from surgeon.runtime.errors import BuildError, TargetError
from surgeon.runtime.package.target import Target

HOPPER = tiles_of(Target.parse("cuda:90"))


def milliseconds(tiles: TargetTiles, phase: str) -> float:
    """A device that favours few warps, and large key tiles for many queries but small ones for one query."""
    tile = tiles.listed(phase, 128)
    return tile.warps + (64 / tile.keys if phase == "prefill" else tile.keys / 64) + tile.stages / 100


def tuned(measure: Callable[[TargetTiles, str], float], tried: Callable[[Trial], None] = lambda _: None) -> TargetTiles:
    return tune(HOPPER, 128, 4, measure, tried).tiles


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:90", "cuda:120", "hip:gfx90a", "hip:gfx950"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_candidates_begin_with_the_present_tile_and_fit_the_device(target: str, head_dim: int) -> None:
    tiles = tiles_of(Target.parse(target))
    for phase, candidates in (
        ("prefill", prefill_candidates(tiles, head_dim, 4)),
        ("decode", decode_candidates(tiles, head_dim)),
    ):
        assert candidates[0] == tiles.listed(phase, head_dim)
        assert len(set(candidates)) == len(candidates) > 3
        for tile in candidates:
            assert tile.warps * tiles.device.warp_size <= 1024
            assert 4 * tile.stages * tile.keys * head_dim <= tiles.device.shared_bytes
            assert tile.keys <= tile.queries or phase == "decode"
        # The format can express each of them.
        for tile in candidates:
            changed = {tiles.target: tiles.with_tile(phase, head_dim, tile)}
            assert parse_tiles(tiles_json(changed, "a test")) == changed


def test_candidates_are_of_every_variant_that_the_target_and_the_heads_allow() -> None:
    def variants(target: str, heads_per_kv_head: int) -> set[tuple[str, int]]:
        tiles = tiles_of(Target.parse(target))
        return {(tile.loads, tile.heads) for tile in prefill_candidates(tiles, 128, heads_per_kv_head)}

    assert variants("cuda:90", 4) == {(loads, heads) for loads in ("pointers", "descriptors") for heads in (1, 2)}
    assert variants("cuda:90", 3) == {("pointers", 1), ("descriptors", 1)}
    assert variants("cuda:80", 4) == {("pointers", 1), ("pointers", 2)}


def test_the_fastest_is_also_tried_with_the_other_kind_of_programs() -> None:
    def measure(tiles: TargetTiles, phase: str) -> float:
        gain = 0.9 if tiles.listed("prefill", 128).persistent else 1.0
        return milliseconds(tiles, phase) * (gain if phase == "prefill" else 1.0)

    told: list[Trial] = []
    found = tuned(measure, told.append)
    best = Tile(queries=128, keys=128, warps=4, stages=2, persistent=True)
    assert found.listed("prefill", 128) == best
    assert [trial.tile for trial in told if trial.tile.persistent] == [best]

    back: list[Trial] = []
    assert (
        tune(found, 128, 4, milliseconds, back.append).tiles.listed("prefill", 128) == best
    )  # equally fast, and first
    assert [trial.tile for trial in back if trial.phase == "prefill" and not trial.tile.persistent] == [
        dataclasses.replace(best, persistent=False)
    ]


def test_a_device_with_less_shared_memory_has_fewer_candidates() -> None:
    small = dataclasses.replace(HOPPER, device=dataclasses.replace(HOPPER.device, shared_bytes=65536))
    assert set(prefill_candidates(small, 256, 4)) < set(prefill_candidates(HOPPER, 256, 4))


def test_the_fastest_of_each_phase_is_taken() -> None:
    found = tuned(milliseconds)
    assert found.listed("prefill", 128) == Tile(queries=128, keys=128, warps=4, stages=2)
    assert found.listed("decode", 128) == Tile(queries=16, keys=16, warps=2, stages=1)
    assert found.listed("prefill", 64) == HOPPER.listed("prefill", 64)


def test_decoding_is_timed_with_the_tiles_chosen_for_prefill() -> None:
    beside: set[Tile] = set()

    def measure(tiles: TargetTiles, phase: str) -> float:
        if phase == "decode":
            beside.add(tiles.listed("prefill", 128))
        return milliseconds(tiles, phase)

    found = tuned(measure)
    assert beside == {found.listed("prefill", 128)}


def test_of_equally_fast_tiles_the_present_one_stays() -> None:
    assert tuned(lambda _tiles, _phase: 1.0) == HOPPER


def test_what_fails_is_told_and_not_taken() -> None:
    def measure(tiles: TargetTiles, phase: str) -> float:
        if tiles.listed(phase, 128).warps < 8:
            raise BuildError("ptxas", "registers enough", "spills", "take more warps")
        return milliseconds(tiles, phase)

    told: list[Trial] = []
    found = tuned(measure, told.append)
    assert found.listed("prefill", 128).warps == found.listed("decode", 128).warps == 8
    assert len(told) == len(prefill_candidates(HOPPER, 128, 4)) + 1 + len(decode_candidates(HOPPER, 128))
    for trial in told:
        assert (trial.milliseconds is None) == (trial.tile.warps < 8)
        assert trial.fault == (
            "" if trial.tile.warps == 8 else "ptxas: expected registers enough, got spills; take more warps"
        )


def test_a_device_on_which_nothing_works() -> None:
    def measure(tiles: TargetTiles, phase: str) -> float:
        if phase == "decode":
            raise TargetError("the device", "room", "none", "take another")
        return 1.0

    with pytest.raises(TargetError, match=r"decode on cuda:90, head size 128: expected a tile that works, got none of"):
        tuned(measure)
