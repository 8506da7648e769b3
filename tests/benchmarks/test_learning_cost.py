"""What learning costs is measured of the process that learns, and kept a row for each model."""

import json
from pathlib import Path

import pytest

import learning_cost
from models import tiny_llama

TOPOLOGY = {
    "block_size": 64,
    "num_blocks": 32,
    "provenance": {"model": "tiny", "density": 0.25, "cpu_seconds": 3.5},
}
MEGABYTES = 300
LEARNER = f"""
import json, pathlib, sys
held = b"x" * {MEGABYTES}_000_000
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text({json.dumps(TOPOLOGY)!r})
"""


def test_the_row_is_of_the_process_that_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_cost, "LEARNER", LEARNER)
    row = learning_cost.learning(tmp_path / "tiny", [tmp_path / "a.txt"], ["--density", "0.25"])
    assert MEGABYTES < row.pop("peak_mb") < MEGABYTES + 100
    assert row == {
        "model": "tiny",
        "command": "surgeon learn tiny --text a.txt --density 0.25",
        "length": 2048,
        "block_size": 64,
        "density": 0.25,
        "cpu_seconds": 3.5,
    }


def test_a_learner_that_fails_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_cost, "LEARNER", "raise SystemExit(2)")
    with pytest.raises(SystemExit) as ended:
        learning_cost.learning(tmp_path, [], [])
    assert ended.value.code == 2


def test_a_prompt_is_timed_with_the_models_size(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    found = learning_cost.prompt(tmp_path, 64)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["prompt_cpu_seconds"] > 0


def test_each_model_has_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_cost, "RESULTS", tmp_path / "results.json")
    for model, parameters, seconds in (("large", 500, 9.0), ("small", 100, 2.0), ("large", 500, 8.0)):
        row = {"model": model, "parameters": parameters, "cpu_seconds": seconds, "peak_mb": 1, "prompt_cpu_seconds": 1}
        learning_cost.keep(row)
    rows = json.loads(learning_cost.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["cpu_seconds"]) for row in rows] == [("small", 2.0), ("large", 8.0)]
