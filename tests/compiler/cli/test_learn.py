"""`surgeon learn`, from a model folder and text files to a topology file that compiles."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models import tiny_llama
from surgeon.compiler import compile_package
from surgeon.compiler.cli.main import main
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime import load, patch
from surgeon.runtime.errors import PatchError


def command(folder: Path, out: Path, *more: str) -> list[str]:
    texts = ["--text", str(folder / "a.txt"), "--text", str(folder / "b.txt")]
    shape = ["--density", "0.5", "--length", "128", "--block", "16", "--out", str(out)]
    return ["learn", str(folder / "model"), *texts, *shape, *more]


def test_it_writes_a_topology_and_says_what_it_reached(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path / "t.json")) == 0
    printed = capsys.readouterr()
    assert "t.json: budget, " in printed.out
    assert "KL divergence from the dense model on validation text, of the tokens after a prompt: " in printed.out
    topology = read_topology(tmp_path / "t.json")
    assert (topology.num_blocks, topology.block_size, topology.model.num_hidden_layers) == (8, 16, 3)
    assert [text["name"] for text in topology.provenance["texts"]] == ["a.txt", "b.txt"]
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"], "the finished steps are cleared away"

    assert main(command(folder, tmp_path / "u.json", "--json", "--work", str(tmp_path / "steps"))) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["topology_sha256"] == topology.sha256
    assert list((tmp_path / "steps").iterdir()), "a folder that was named stays"


@pytest.mark.parametrize(
    ("more", "stages"), [((), 9), (("--cuts",), 12), (("--method", "ultrametric", "--steps", "2"), 4)]
)
def test_every_stage_has_a_line_and_what_they_need_comes_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], stages: int
) -> None:
    assert main([*command(folder, tmp_path / "t.json"), *more]) == 0
    first, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"surgeon: {stages} stages, about \d+ s and [\d.]+ GB of memory in all", first)
    named = [
        re.fullmatch(rf"surgeon: stage (\d+) of {stages}, .+: \d+ s so far, about \d+ s left", each) for each in lines
    ]
    assert list(dict.fromkeys(int(each[1]) for each in named if each)) == list(range(1, stages + 1))
    assert len(lines) == len([each for each in named if each]) <= stages + 1, "the descent of its steps may say more"


def test_the_block_suits_the_density_unless_it_is_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--text", str(folder / "a.txt"), "--method", "window", "--out", str(tmp_path / "w.json")]
    for density, length, block in (("0.8", "512", 32), ("0.3", "512", 16), ("0.9", "1024", 64)):
        shape = ["--density", density, "--length", length]
        assert main(["learn", str(folder / "model"), *texts, *shape]) == 0
        assert read_topology(tmp_path / "w.json").block_size == block
        assert f" of the blocks of {block} tokens, " in capsys.readouterr().out


def test_windows_that_are_taken_keep_their_block(folder: Path, tmp_path: Path) -> None:
    windows, out = tmp_path / "w.json", tmp_path / "r.json"
    shape = ["--text", str(folder / "a.txt"), "--density", "0.7", "--length", "128"]
    assert (
        main(["learn", str(folder / "model"), *shape, "--method", "window", "--block", "32", "--out", str(windows)])
        == 0
    )
    taken = ["--for", "text", "--route", "convert", "--windows", str(windows), "--out", str(out)]
    assert main(["learn", str(folder / "model"), *shape, *taken]) == 0
    assert read_topology(out).block_size == 32


def test_equal_windows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path / "w.json", "--method", "window")) == 0
    assert "w.json: window, " in capsys.readouterr().out
    assert read_topology(tmp_path / "w.json").provenance["method"] == "window"


def test_what_was_learned_fits_the_model_in_any_dtype_and_no_other(folder: Path, tmp_path: Path) -> None:
    assert main(command(folder, tmp_path / "w.json", "--method", "window")) == 0
    package = load(compile_package(read_topology(tmp_path / "w.json"), tmp_path / "kernels", dtypes=["fp32"]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        patch(LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype), package)
    with pytest.raises(PatchError, match="weights: expected those that the topology was learned on"):
        patch(tiny_llama(seed=7), package)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--text", "missing.txt"), "missing.txt: expected a readable text file"),
        (("--length", "100"), "--length: expected a multiple of the block"),
        (("--density", "0.05"), "--density: expected at least 0.4167"),
        (("--density", "2"), "expected a number above 0 and at most 1, got '2'"),
        (("--seed", "-1"), "expected a whole number of at least 0, got '-1'"),
        (("--method", "magic"), "invalid choice: 'magic'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, str], message: str
) -> None:
    assert main(command(folder, tmp_path / "t.json", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "t.json").exists()


def test_where_the_topology_goes_is_seen_to_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path)) == 2
    assert "expected a file to write, got a folder" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "new" / "folder" / "t.json", "--method", "window")) == 0
    assert read_topology(tmp_path / "new" / "folder" / "t.json").num_blocks == 8


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    status = main(
        ["learn", str(tmp_path), "--text", str(tmp_path / "a.txt"), "--density", "0.5", "--out", str(tmp_path / "t")]
    )
    assert status == 2
    assert "expected a causal language model with its tokenizer" in capsys.readouterr().err


def test_compiling_does_not_import_the_learner() -> None:
    script = (
        "import sys, surgeon.compiler, surgeon.compiler.cli.main, surgeon.compiler.pipeline\n"
        "sys.exit('surgeon.compiler.learn' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
