"""`surgeon pilot`: its file, its output and its exit status."""

import json
from pathlib import Path

import pytest

import surgeon.runtime
from models import sparse_topology, tiny_config, tiny_llama
from surgeon.compiler import compile_package
from surgeon.compiler.cli.main import main
from surgeon.compiler.pilot.baseline import density_at
from surgeon.runtime.evaluate.pilot.pilot_file import read_pilot
from surgeon.runtime.evaluate.tasks.prompts import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(sparse_topology(), tmp_path_factory.mktemp("pilot") / "kernels", dtypes=("fp32",))


def command(folder: Path, package: Path, out: Path, *more: str) -> list[str]:
    text = ["--text", str(folder / "a.txt"), "--text", str(folder / "b.txt")]
    size = ["--length", "96", "--sequences", "2", "--tasks", "0", "--rounds", "1", "--out", str(out)]
    return ["pilot", str(folder / "model"), str(package), *text, *size, *more]


def test_it_writes_its_file_prints_a_table_and_passes(
    folder: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pilot.json"
    easy = ("--max-ppl-ratio", "50", "--max-divergence", "50", "--min-speedup", "0.0001", "--dense-rows", "16")
    assert main(command(folder, package, out, *easy)) == 0
    printed, said = capsys.readouterr()
    assert "continuation: perplexity, times dense" in printed
    assert "met: perplexity of the continuation, times dense" in printed
    assert "retrieval was not judged" in printed
    first, *lines = said.splitlines()
    assert first.startswith("surgeon: 3 stages, about ")
    stages = [line.split(",")[0].removeprefix("surgeon: ") for line in lines]
    assert list(dict.fromkeys(stages)) == [f"stage {number} of 3" for number in range(1, 4)]
    pilot = read_pilot(out)
    assert [file.name for file in tmp_path.iterdir()] == ["pilot.json"]
    columns = [(column.name, column.recall, column.dense_rows) for column in pilot.columns]
    assert columns == [
        ("dense", None, None),
        ("patched", "dense", 16),
        ("pattern", "pattern", 0),
        ("window", "dense", 16),
    ]
    forgotten, recalled = (pilot.columns[index].against_dense for index in (2, 1))
    assert forgotten is not None
    assert recalled is not None
    assert forgotten.continuation_divergence is not None
    assert recalled.continuation_divergence is not None
    assert recalled.continuation_divergence.value < forgotten.continuation_divergence.value
    assert [(text.name, text.sequences) for text in pilot.texts] == [("a.txt", 2), ("b.txt", 2)]
    assert pilot.columns[1].topology_sha256 == sparse_topology().sha256
    assert pilot.columns[1].density == pytest.approx(density_at(sparse_topology(), 96))
    assert pilot.columns[2].density == pilot.columns[1].density
    assert abs(pilot.columns[1].density - pilot.columns[3].density) < 0.05
    assert pilot.weights_unchanged
    assert pilot.passed
    assert pilot.surgeon == surgeon.runtime.__version__


def test_a_missed_threshold_is_status_3(
    folder: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pilot.json"
    more = ("--no-window", "--recall", "pattern", "--max-ppl-ratio", "0.0001", "--min-speedup", "100000", "--json")
    assert main(command(folder, package, out, *more)) == 3
    printed, reason = capsys.readouterr()
    assert reason.splitlines()[-1].startswith("surgeon: refused: perplexity of the continuation, times dense ")
    assert "; speed-up of the first token " in reason.splitlines()[-1]
    assert sum("refused" in line for line in reason.splitlines()) == 1
    said = json.loads(printed)
    assert said == json.loads(out.read_text())
    assert [threshold["met"] for threshold in said["thresholds"]] == [False, False]
    assert [(column["name"], column["recall"]) for column in said["columns"]] == [
        ("dense", None),
        ("patched", "pattern"),
    ]


def test_an_interrupted_pilot_goes_on(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "pilot.json"
    limits = ("--max-ppl-ratio", "50")
    with monkeypatch.context() as patched:
        patched.setattr("surgeon.runtime.evaluate.pilot.run.measure_speed", interrupt)
        assert main(command(folder, package, out, *limits)) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["pilot.json.steps"]
    monkeypatch.setattr("surgeon.runtime.evaluate.continuation.continued_states", None)  # all have been read
    assert main(command(folder, package, out, *limits)) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["pilot.json"]
    capsys.readouterr()


def test_a_pilots_steps_stay_in_a_folder_that_was_named(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("--max-ppl-ratio", "50", "--no-window", "--no-pattern", "--work", str(tmp_path / "work"))
    assert main(command(folder, package, tmp_path / "one.json", *kept)) == 0
    monkeypatch.setattr("surgeon.runtime.evaluate.continuation.continued_states", None)
    assert main(command(folder, package, tmp_path / "other.json", *kept)) == 0
    one, other = (read_pilot(tmp_path / f"{name}.json") for name in ("one", "other"))
    assert [column.name for column in one.columns] == ["dense", "patched"]
    assert [each.losses for each in one.columns] == [each.losses for each in other.columns]
    for file in (tmp_path / "work").iterdir():
        file.write_bytes(b"damaged")
    assert main(command(folder, package, tmp_path / "one.json", *kept)) == 2


def test_each_models_answers_are_kept_by_themselves(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, int] = {}

    def answered(model: object, _tokenizer: object, prompt: Prompt) -> tuple[float, ...]:
        return (1 - seen.setdefault(id(model), len(seen)) / 8,) * len(prompt.questions)

    monkeypatch.setattr("surgeon.runtime.evaluate.retrieval.scores", answered)
    asked = (
        "--length",
        "480",
        "--tasks",
        "1",
        "--ask",
        "single number",
        "--max-ppl-ratio",
        "50",
        "--min-retrieval",
        "0",
    )
    assert main(command(folder, package, tmp_path / "pilot.json", *asked)) == 0
    columns = read_pilot(tmp_path / "pilot.json").columns
    assert [set(column.scores) for column in columns] == [{1.0}, {0.875}, {0.75}, {0.625}]


def test_bad_input_is_one_line_and_status_2(
    folder: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0\1")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("1 2 3")
    tiny_llama(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    capsys.readouterr()  # the progress of saving
    out = tmp_path / "pilot.json"
    whole = command(folder, package, out)

    def instead(old: object, new: object) -> list[str]:
        return [str(new) if argument == str(old) else argument for argument in whole]

    cases = [
        ([*whole[:3], "--out", str(out)], "required: --text"),
        ([*whole, "--text", str(tmp_path / "binary")], "expected UTF-8 text"),
        ([*whole, "--text", str(tmp_path / "empty")], "got an empty file"),
        ([*whole, "--text", str(tmp_path / "short")], "expected at least 96 tokens"),
        ([*whole, "--text", str(tmp_path / "missing")], "expected a readable text file"),
        ([*whole, "--length", "4096"], "the model's context"),
        ([*whole, "--length", "3"], "--length: expected 4 to 512 tokens"),
        ([*whole, "--tasks", "1"], "': expected prompts of at least "),
        ([*whole, "--tasks", "1", "--ask", "common words"], "the task 'common words': expected prompts of at least "),
        ([*whole, "--work", str(tmp_path / "binary")], "binary: expected a folder, got "),
        ([*whole, "--work", str(tmp_path / "binary" / "work")], "work: expected a folder, got "),
        ([*whole, "--ask", "single numbers"], "did you mean single number?"),
        ([*whole, "--recall", "some"], "argument --recall: invalid choice: 'some'"),
        ([*whole, "--dense-rows", "-1"], "--dense-rows: expected a whole number of at least 1, got '-1'"),
        ([*whole, "--dense-rows", "1.5"], "--dense-rows: expected a whole number of at least 1, got '1.5'"),
        ([*whole, "--min-retrieval", "-1"], "expected a number of at least 0, got '-1'"),
        ([*whole, "--max-ppl-ratio", "nan"], "expected a number above 0, got 'nan'"),
        ([*whole, "--out", str(tmp_path / "no" / "pilot.json")], "a folder that exists"),
        (instead(folder / "model", tmp_path / "model"), "num_hidden_layers"),
        (instead(folder / "model", tmp_path), "a causal language model"),
        (instead(package, tmp_path), "a package with manifest.json"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not out.exists()
