"""The assessment of made-up costs and of a tiny model."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from models import tiny_llama, tokens
from surgeon.compiler.cli.assess import picture
from surgeon.compiler.cli.main import INTERRUPTED, main
from surgeon.compiler.learn.assess import assess, expected_curve, stability, summarize
from surgeon.compiler.learn.measure import runs
from surgeon.compiler.learn.measure.runs import Costs
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.learn.patterns.windows import uniform_windows
from surgeon.compiler.learn.texts.text import TokenText
from surgeon.runtime.errors import TopologyError

GRID = Grid(16, 32, 1, 0.25)
EQUAL = uniform_windows(2, 3, 32, 1, 0.25)


def costs(heads: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Costs:
    """Costs that halve with each block of window, from a head's first cost."""
    table = heads[..., None] * 0.5 ** np.arange(32)
    return Costs(table, 2 * table)


def test_the_stability_is_the_rank_correlation_between_texts() -> None:
    rising = np.arange(6.0).reshape(2, 3)
    assert stability([rising]) is None
    assert stability([rising, rising**2]) == pytest.approx(1.0)
    assert stability([rising, -rising]) == pytest.approx(-1.0)
    assert stability([rising, rising, -rising]) == pytest.approx(-1 / 3)


def test_the_curve_falls_and_windows_by_cost_are_never_expected_to_be_worse() -> None:
    curve = expected_curve(costs(np.array([[1.0, 20.0, 3.0], [0.1, 5.0, 50.0]])), GRID, EQUAL, measured=0.2)
    assert [point.density for point in curve] == [0.15, 0.2, 0.25, 0.35, 0.5, 0.75]
    assert all(one.allocated > other.allocated for one, other in itertools.pairwise(curve))
    assert all(point.allocated < point.equal for point in curve)
    assert curve[2].equal == pytest.approx(0.2), "scaled to what was measured"


def test_a_heads_cost_is_its_share_and_the_picture_shows_its_rank() -> None:
    heads = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 5.5]])
    missed = np.tile(np.linspace(0.9, 0.0, 32), (2, 3, 1))
    found = summarize([costs(heads)] * 2, [missed] * 2, GRID, EQUAL, 0.2)
    assert np.sum(found.cost) == pytest.approx(1.0)
    assert found.stability == pytest.approx(1.0)
    assert found.window == int(EQUAL.min())
    assert np.allclose(found.missed, missed[0, 0, found.window - 1])
    lines = list(picture(found))
    assert lines[1].startswith("layer   0  013")
    assert lines[2].startswith("layer   1  568")
    assert lines[3].startswith("attention beyond the sink and the last 3 blocks: ")
    assert sum(line.startswith("  at ") for line in lines) == 6


def test_a_model_is_assessed_the_same_twice() -> None:
    texts = [TokenText(name, name, tokens(1, 512, seed)[0]) for seed, name in enumerate("ab")]
    grid = Grid(16, 8, 1, 0.5)
    found = assess(tiny_llama(), texts, grid)
    assert found == assess(tiny_llama(), texts, grid)
    assert np.array(found.cost).shape == np.array(found.missed).shape == (3, 4)
    assert found.measured > 0
    assert found.stability is not None
    assert -1 <= found.stability <= 1
    with pytest.raises(TopologyError, match="--density"):
        assess(tiny_llama(), texts, Grid(16, 8, 1, 0.1))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["assess", str(folder / "model"), "--text", str(folder / "a.txt"), "--length", "128", "--block", "16"]
    assert main([*command, "--density", "0.5"]) == 0
    out, said = capsys.readouterr()
    printed, lines = out.splitlines(), said.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "surgeon: 2 stages",
        "surgeon: stage 1 of 2",
        "surgeon: stage 2 of 2",
    ]
    assert printed[0].startswith("What equal windows at 50% of the blocks cost")
    assert main([*command, "--density", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["stability"] is None
    assert len(said["cost"]) == 3
    assert main([*command, "--length", "100"]) == 2
    assert "expected a multiple of the block" in capsys.readouterr().err


def test_an_interrupted_command_continues_and_then_clears_its_steps_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    shape = ["--length", "128", "--block", "16", "--density", "0.5", "--json"]
    command = ["assess", str(folder / "model"), "--text", str(folder / "a.txt"), *shape]

    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "sparse_divergence", interrupted)
        assert main(command) == INTERRUPTED
    kept = list(tmp_path.rglob("*.safetensors"))
    assert kept
    with monkeypatch.context() as patch:
        patch.setattr(runs, "observe_dense", None)  # what was done is not repeated
        assert main(command) == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    again = capsys.readouterr().out
    assert main([*command, "--work", str(tmp_path / "steps")]) == 0
    assert capsys.readouterr().out == again
    assert list((tmp_path / "steps").iterdir()), "a folder that was named stays"


def test_the_length_that_is_measured_may_be_shorter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--length", "512", "--measured-length", "128", "--block", "16", "--density", "0.5"]
    command = ["assess", str(folder / "model"), "--text", str(folder / "a.txt"), *shape]
    assert main(command) == 0
    assert "measured at 128 tokens; at 512 equal windows have " in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["length"], said["grid"]["blocks"]) == (512, 8)


def test_a_cache_that_cannot_be_written_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SURGEON_CACHE", "/proc/nothing")
    shape = ["--length", "128", "--block", "16", "--density", "0.5"]
    assert main(["assess", str(folder / "model"), "--text", str(folder / "a.txt"), *shape]) == 0
    assert "What equal windows at 50%" in capsys.readouterr().out
