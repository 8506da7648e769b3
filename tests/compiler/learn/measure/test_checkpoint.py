"""The model that a topology is learned on, read from the formats that users have."""

from pathlib import Path

import pytest
import torch

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


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"tiny.gguf: expected a causal language model with its tokenizer, got "):
        read_model(str(tmp_path / "tiny.gguf"))
