"""What can be refused is refused before the work: without torch where files tell, else before weights are read."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

import packages
import topologies
from command_line import fails
from gguf_file import TOKENS, write_gguf
from models import sparse_topology, tiny_config, tiny_llama
from surgeon.compiler.cli import main as cli
from surgeon.compiler.learn.measure import before_weights

LEARN = ("--density", "0.5", "--length", "128", "--block", "16")


@pytest.fixture
def weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


def learn(model: Path, texts: Sequence[Path], out: Path, *more: str) -> list[str]:
    named = [argument for text in texts for argument in ("--text", str(text))]
    return ["learn", str(model), *named, *LEARN, "--out", str(out), *more]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["learn", "m", "--text", "a.txt", *LEARN, "--out", "."], "expected a file to write, got a folder"),
        (["learn", "m", "--text", "a.txt", *LEARN, "--out", "a.txt/t.json"], "expected a place in a folder"),
        (["learn", "m", "--text", "a.txt", *LEARN, "--out", "/proc/t.json"], "expected a place to write"),
        (["learn", "m", "--text", "none", *LEARN, "--out", "t.json"], "none: expected a readable text file"),
        (["learn", "m", "--text", "a.txt", *LEARN, "--length", "100", "--out", "t"], "--length: expected a multiple"),
        (["learn", "m", "--text", "a.txt", *LEARN, "--density", "0.05", "--out", "t"], "--density: expected at least"),
        (
            ["learn", "m", "--text", "a.txt", *LEARN, "--measured-length", "70", "--out", "t"],
            "--measured-length: expected a multiple of the block",
        ),
        (
            ["learn", "m", "--text", "a.txt", *LEARN, "--measured-length", "64", "--cuts", "--out", "t"],
            "clusters: expected equal --length and --measured-length",
        ),
        (["assess", "m", "--text", "none"], "none: expected a readable text file"),
        (["assess", "m", "--text", "a.txt", "--length", "100"], "--length: expected a multiple"),
        (["assess", "m", "--text", "a.txt", "--density", "0.01"], "--density: expected at least"),
        (["pilot", "m", "kernels", "--text", "none"], "none: expected a readable text file"),
        (["pilot", "m", "none", "--text", "a.txt"], "none: expected a package folder"),
        (["pilot", "m", "kernels", "--text", "a.txt", "--out", "none/p.json"], "expected a place in a folder"),
        (["pilot", "m", "kernels", "--text", "a.txt", "--out", "kernels"], "expected a file to write, got a folder"),
        (["report", "p", "t", "--out", "none/report.html"], "expected a place in a folder"),
        (["tune", "t", "--out", "none/tiles.json"], "expected a place in a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_files_and_numbers_tell_is_told_without_torch(
    command: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    packages.write(Path("kernels"), topologies.window_topology([1, 2], num_blocks=4))
    for name in ("torch", "transformers"):  # an import would now fail
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("surgeon.compiler.") and name.endswith(".run")]:
        monkeypatch.delitem(sys.modules, name)
    assert words in fails(capsys, 2, *command)


def test_a_compile_sees_that_it_can_write_before_it_compiles(
    topology_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, 2, "compile", topology_file, "--out", "/proc/new/kernels")
    assert "/proc/new: expected a place to write" in line
    line = fails(capsys, 2, "compile", topology_file, "--out", topology_file / "kernels")
    assert "expected a place in a folder that exists" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "a.txt").write_text("some text")
    command = learn(Path("m"), [tmp_path / "a.txt"], tmp_path / "closed" / "t.json")
    assert "Permission denied" in fails(capsys, 2, *command)


@pytest.mark.usefixtures("weights_are_not_read")
def test_a_text_that_is_too_short(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("1 2 3")
    texts = [folder / "a.txt", tmp_path / "short.txt"]
    assert "at least 256 tokens: two" in fails(capsys, 2, *learn(folder / "model", texts, tmp_path / "t.json"))
    assert "--cuts: expected 7 sequences" in fails(
        capsys, 2, *learn(folder / "model", [folder / "a.txt"], tmp_path / "t.json", "--cuts", "--length", "256")
    )
    assert "at least 256 tokens: two" in fails(capsys, 2, "assess", folder / "model", "--text", texts[1], *LEARN)


@pytest.mark.usefixtures("weights_are_not_read")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny_config(num_hidden_layers=2), "model.config.num_hidden_layers: expected 3"),
        (
            Qwen2Config(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=128),
            "model.config.model_type: expected 'llama'",
        ),
    ],
)
def test_a_pilot_of_a_package_for_another_model(
    config: PreTrainedConfig,
    words: str,
    folder: Path,
    compiled_sparse: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    command = ["pilot", tmp_path / "model", compiled_sparse, "--text", folder / "a.txt", "--out", tmp_path / "p.json"]
    assert words in fails(capsys, 2, *command)


@pytest.fixture(scope="module")
def compiled_sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from surgeon.compiler import compile_package

    return compile_package(sparse_topology(), tmp_path_factory.mktemp("sparse") / "kernels", dtypes=("fp32",))


@pytest.mark.usefixtures("weights_are_not_read")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny_config(sliding_window=64, model_type="mistral"), "sliding_window"),
        (GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=97), "output projection o_proj"),
        (PreTrainedConfig(), "expected a causal language model with its tokenizer"),
    ],
)
@pytest.mark.parametrize("command", ["learn", "assess"])
def test_a_family_that_cannot_be_learned(
    command: str, config: Any, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    if isinstance(config, LlamaConfig):  # a Mistral's keys are a Llama's and a window
        from transformers import MistralConfig

        config = MistralConfig(**{**config.to_dict(), "sliding_window": 64})
    config.save_pretrained(tmp_path / "model")
    arguments = learn(tmp_path / "model", [folder / "a.txt"], tmp_path / "t.json")
    if command == "assess":
        arguments = ["assess", *arguments[1:-2]]
    assert words in fails(capsys, 2, *arguments)


# GGUF


def test_the_ending_of_a_gguf_file_may_be_in_capitals(tmp_path: Path) -> None:
    write_gguf(tiny_llama(tiny_config(vocab_size=len(TOKENS))), tmp_path / "TINY.GGUF")
    outline = before_weights.read_outline(str(tmp_path / "TINY.GGUF"))
    assert outline.model.config.model_type == "llama"
    assert outline.context == 512
    assert outline.tokenizer("th")["input_ids"]


@pytest.mark.usefixtures("weights_are_not_read")
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", "o_proj"),
        ("mamba", "MambaForCausalLM: expected a model whose attention"),
        ("nothing", "architecture nothing"),
    ],
)
def test_a_gguf_of_a_family_that_cannot_be_learned(
    family: str, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tiny_llama(tiny_config(vocab_size=len(TOKENS))), tmp_path / "tiny.gguf", family)
    line = fails(capsys, 2, *learn(tmp_path / "tiny.gguf", [folder / "a.txt"], tmp_path / "t.json"))
    assert words in line


# The model's context


@pytest.mark.parametrize("command", ["learn", "assess"])
def test_a_length_beyond_the_models_context_is_warned_of(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = learn(folder / "model", [folder / "a.txt"], tmp_path / "t.json", "--measured-length", "128")
    arguments[arguments.index("--length") + 1] = "1024"
    if command == "assess":
        arguments = ["assess", *arguments[1 : arguments.index("--out")], "--measured-length", "128"]
    assert cli.main(arguments) == 0
    warning = "surgeon: warning: --length: 1,024 tokens are beyond the model's context of 512"
    said = capsys.readouterr().err
    assert [line.startswith(warning) for line in said.splitlines() if "warning" in line] == [True]


def test_the_checks_import_little() -> None:
    script = (
        "import sys\n"
        "import surgeon.compiler.learn.texts.text_file, surgeon.compiler.learn.patterns.reach\n"
        "import surgeon.compiler.system.atomic_files, surgeon.runtime.package.reader\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
