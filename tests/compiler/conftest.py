"""Files that the tests of commands share: a topology, and a tiny model with texts."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import topologies
from models import VOCABULARY, tiny_llama, tokens


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that reads numbers, and two texts of them."""
    folder = tmp_path_factory.mktemp("learn")
    tiny_llama().save_pretrained(folder / "model")
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder / "model")
    for seed, name in enumerate("ab"):
        text = " ".join(map(str, tokens(1, 1024, seed)[0].tolist()))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    file = tmp_path / "topology.json"
    file.write_text(
        json.dumps(
            topologies.document([[topologies.DENSE, topologies.head()]], [{"linkage": [[0, 1, 1.0, 2]]}], num_blocks=2)
        )
    )
    return file
