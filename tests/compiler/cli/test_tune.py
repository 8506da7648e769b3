"""`surgeon tune`, from the command line to a table that `surgeon compile` accepts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import fails
from gpu_sources import prefill_sources
from surgeon.compiler.cli import main as cli
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import TargetTiles, read_tiles, tiles_of
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.tune.trial import Bench
from surgeon.runtime.package.target import Target
from topologies import random_topology

HOPPER = Target.parse("cuda:90")


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    topology = random_topology(
        np.random.default_rng(0), num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, block_size=128, num_blocks=5
    )
    file = tmp_path / "topology.json"
    file.write_text(topology.canonical())
    return file


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Bench]:
    """Fakes a machine with a GPU, as far as the command looks, that favours few stages; returns the benches it made."""
    benches: list[Bench] = []

    def measure(bench: Bench, tiles: TargetTiles, phase: str) -> float:
        benches.append(bench)
        return float(tiles.listed(phase, bench.topology.model.head_dim).stages)

    monkeypatch.setattr(Bench, "measure", measure)
    monkeypatch.setattr("surgeon.compiler.tune.run.device_here", lambda: (torch.device("cuda", 0), HOPPER))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a test's card")
    return benches


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(topology_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = topology_file.with_name("tiles.json")
    assert cli.main(["tune", str(topology_file), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    line = "surgeon: surgeon tune: expected a GPU that torch can use, got none; run it on the machine that will serve\n"
    assert (printed.out, printed.err) == ("", line)
    assert not out.exists()


@pytest.mark.usefixtures("gpu")
def test_without_triton_it_says_so_before_any_trial(
    topology_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    out = topology_file.with_name("tiles.json")
    line = fails(capsys, 2, "tune", topology_file, "--out", out)
    assert line.startswith("surgeon: target cuda:90: expected the Python package triton, got none; run pip install ")
    assert not out.exists()


def test_a_variant_is_printed_where_it_is_not_the_default(
    topology_file: Path, capsys: pytest.CaptureFixture[str], gpu: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_bench: Bench, tiles: TargetTiles, phase: str) -> float:
        tile = tiles.listed(phase, 128)
        return 4.0 - (tile.loads == "descriptors") - (tile.heads == 2) - tile.persistent

    monkeypatch.setattr(Bench, "measure", measure)
    out = topology_file.with_name("tiles.json")
    assert cli.main(["tune", str(topology_file), "--out", str(out)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert ", 2 stages, loads by descriptors, 2 heads, persistent programs, 1.000 ms, before 4.000 ms" in first
    found = read_tiles(out)[HOPPER].prefill_tile(128, 128, 2)
    assert (found.heads, found.persistent) == (2, True)


def test_what_it_writes_compiles(topology_file: Path, gpu: list[Bench], capsys: pytest.CaptureFixture[str]) -> None:
    out = topology_file.with_name("tiles.json")
    assert cli.main(["tune", str(topology_file), "--out", str(out), "--layer", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "cuda:90 head size 128 prefill: 64 queries, 32 keys, 4 warps, 2 stages, 2.000 ms, before 3"
    )
    assert lines[1].startswith("cuda:90 head size 128 decode: ")
    assert lines[2] == f"{out}: for surgeon compile --tiles"
    topology = read_topology(topology_file)
    assert {bench.topology.layers for bench in gpu} == {topology.layers[1:]}

    assert json.loads(out.read_text())["source"].startswith("surgeon tune on a test's card, torch 2.")
    tiles = read_tiles(out)
    assert tiles.keys() == {HOPPER}
    assert tiles[HOPPER].prefill[64] == tiles_of(HOPPER).prefill[64]
    sources = prefill_sources(specialize_gpu(topology, schedule_layers(topology), HOPPER, tiles=tiles))
    assert {source.tile for source in sources} == {tiles[HOPPER].prefill[128]}
    assert tiles[HOPPER].prefill[128] != tiles_of(HOPPER).prefill[128]


def test_several_head_sizes_and_a_table_to_start_from(
    topology_file: Path, gpu: list[Bench], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (topology_file.with_name(name) for name in ("first.json", "second.json"))
    assert cli.main(["tune", str(topology_file), "--out", str(first), "--head-dim", "64"]) == 0
    command = ["tune", str(topology_file), "--out", str(second), "--tiles", str(first), "--json"]
    capsys.readouterr()
    assert cli.main([*command, "--head-dim", "128", "--head-dim", "256"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["trials"]) == ["128", "256"]
    assert {trial["phase"] for trial in report["trials"]["256"]} == {"prefill", "decode"}
    assert read_tiles(second)[HOPPER].prefill[64] == read_tiles(first)[HOPPER].prefill[64]
    assert {bench.topology.model.head_dim for bench in gpu} == {64, 128, 256}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "2"], "--layer: expected a layer that the topology covers, of (0, 1), got 2"),
        (["--layer", "-1"], "--layer"),
        (["--head-dim", "48"], "head_dim: expected one of 16, 32, 64, 80, 96, 128, 256, got 48"),
        (["--tiles", "nothing.json"], "nothing.json: expected a readable file"),
        (["--out", "nowhere/tiles.json"], "expected a place in a folder that exists, got none"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_bad_input_is_one_line(
    topology_file: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = topology_file.with_name("tiles.json")
    assert cli.main(["tune", str(topology_file), "--out", str(out), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert not out.exists()
