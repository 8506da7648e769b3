"""The model that a topology is learned on, read from the formats that users have."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_file import TOKENS, write_gguf
from models import tiny_config, tiny_llama, tokens
from surgeon.compiler.learn.measure.checkpoint import read_model
from surgeon.runtime.errors import ModelError


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    """Includes the order of its rotary dimensions, which differs in a GGUF file."""
    expected = tiny_llama(tiny_config(vocab_size=len(TOKENS)))
    write_gguf(expected, tmp_path / "tiny.gguf")
    model, tokenizer = read_model(str(tmp_path / "tiny.gguf"))
    text = "Blocks that a head sees."
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(found) == len(text) - 1
    assert tokenizer.decode(found) == text
    ids = tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


Damage = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder that a test may break."""
    return Path(shutil.copytree(folder / "model", tmp_path / "model"))


def refused(checkpoint: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_model(str(checkpoint))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    changed: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        changed |= change(name, weight)
    save_file(changed, file, {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: os.truncate(folder / "model.safetensors", 5000), id="cut"),
        pytest.param(lambda folder: os.truncate(folder / "model.safetensors", 0), id="empty"),
        pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), id="noise"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), id="no weights"),
        pytest.param(lambda folder: change_config(folder, intermediate_size=999), id="wider"),
        pytest.param(lambda folder: change_config(folder, num_attention_heads="four"), id="a word for a number"),
        pytest.param(lambda folder: change_config(folder, hidden_size=-64), id="a negative size"),
        pytest.param(lambda folder: change_config(folder, model_type="no-such-model"), id="an unknown type"),
        pytest.param(lambda folder: change_config(folder, model_type=["llama"]), id="a type that is a list"),
        pytest.param(lambda folder: (folder / "config.json").write_text("[1"), id="no JSON"),
        pytest.param(lambda folder: (folder / "config.json").write_text("[]"), id="a list for a config"),
        pytest.param(lambda folder: (folder / "config.json").write_bytes(b"\xff"), id="no text"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), id="an empty tokenizer"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("no"), id="a damaged tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpoint: Path, damage: Damage) -> None:
    damage(checkpoint)
    refused(checkpoint, f"{checkpoint}: expected a causal language model with its tokenizer, got ")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_the_pointer_of_git_lfs_is_called_by_its_name(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(POINTER)
    refused(checkpoint, f"{name}: expected a file of the model, got the pointer to it that Git LFS leaves; run git lfs")


def test_a_pipe_is_not_waited_for(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    refused(checkpoint, "config.json: expected a file, got a pipe")
    os.mkfifo(checkpoint / "model.gguf")
    refused(checkpoint / "model.gguf", "model.gguf: expected a file, got a pipe")


def test_a_link_that_leads_nowhere(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("../../blobs/gone")
    refused(checkpoint, f"{checkpoint}: expected a model's files, got No such file or directory")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, weight: {f"module.{name}": weight}, "got none for lm_head.weight and "),
        (
            lambda name, weight: {} if ".layers.1." in name else {name: weight},
            "got none for model.layers.1.input_layernorm.weight and 8 more; complete the checkpoint",
        ),
        (lambda name, weight: {} if name == "model.norm.weight" else {name: weight}, "got none for model.norm.weight;"),
    ],
    ids=["renamed", "a layer less", "one less"],
)
def test_missing_weights_are_refused(
    checkpoint: Path,
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change_weights(checkpoint, change)
    refused(checkpoint, f"{checkpoint}: expected all weights of the model that its config.json describes", words)
    assert "MISSING" not in capfd.readouterr().err, "the library's own report of many lines is left out"


def test_weights_that_the_model_has_no_place_for_are_left_out(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda name, weight: {name: weight, f"extra.{name}": weight.clone()})
    assert read_model(str(checkpoint))[0].config.model_type == "llama"


def test_tied_weights_are_not_missed(checkpoint: Path) -> None:
    model = tiny_llama(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(checkpoint)
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    found, _ = read_model(str(checkpoint))
    assert torch.equal(found.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"tiny.gguf: expected a causal language model with its tokenizer, got "):
        read_model(str(tmp_path / "tiny.gguf"))
