"""`surgeon plan`, from a model's config to a table."""

import json
from pathlib import Path

import pytest

from command_line import fails
from models import tiny_config
from surgeon.compiler.cli.main import main
from surgeon.compiler.plan import measure

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = ["--length", "128", "--block", "16", "--density", "0.5"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("_PROMPT_SECONDS", "_STEP_SECONDS", "_LARGER_THAN_A_CACHE"):
        monkeypatch.setattr(measure, name, 0)  # three rounds, with nothing to evict
    tiny_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_prints_what_to_gain_and_what_it_costs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), *SHAPE]) == 0
    out, said = capsys.readouterr()
    assert said == ""
    for words in ("first token, s", "decoding, tokens/s", "cache kept, MB", "surgeon learn", "attention is "):
        assert words in out
    assert [file.name for file in model.iterdir()] == ["config.json"], "nothing is left behind"


def test_its_json_has_the_figures_with_their_errors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), *SHAPE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_token"]["times"].keys() == {"value", "error"}
    assert found["learn"].keys() == {"seconds", "memory_bytes"}
    assert (found["layers"], found["length"], found["threads"]) == (3, 128, 1)
    assert found["recall"] == "dense"
    assert found["cache"]["times"]["value"] == 1, "rows that ask read everything, so that nothing is dropped"


def test_bad_input_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a multiple of the block" in fails(capsys, 2, "plan", model, "--length", "100")
    assert "--density: expected at least" in fails(capsys, 2, "plan", model, *SHAPE, "--density", "0.05")
    assert "expected a causal language model" in fails(capsys, 2, "plan", tmp_path)
