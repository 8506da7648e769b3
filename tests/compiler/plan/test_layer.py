"""One layer of a model's shape, from its config alone."""

import json
from pathlib import Path

import pytest

from gguf_file import TOKENS, write_gguf
from models import tiny_config, tiny_llama
from surgeon.compiler.plan.layer import one_layer, read_planned
from surgeon.runtime.errors import ModelError


def test_the_config_is_enough(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "a model")
    planned = read_planned(str(tmp_path / "a model"))
    assert planned.name == "a model"
    assert planned.parameters == tiny_llama().num_parameters()
    assert planned.config.num_hidden_layers == 3


def test_a_layer_is_as_large_as_the_models() -> None:
    def shapes(model: object) -> dict[str, tuple[int, ...]]:
        return {name: tuple(each.shape) for name, each in model.model.layers[0].named_parameters()}  # type: ignore[attr-defined]

    config = tiny_config(tie_word_embeddings=False)
    layer = one_layer(config)
    assert len(layer.model.layers) == 1
    assert shapes(layer) == shapes(tiny_llama(config))
    assert not layer.training
    assert config.num_hidden_layers == 3, "the model's own config is left alone"
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_gguf_file(tmp_path: Path, name: str) -> None:
    model = tiny_llama(tiny_config(vocab_size=len(TOKENS), num_hidden_layers=2))
    write_gguf(model, tmp_path / name)
    planned = read_planned(str(tmp_path / name))
    assert planned.config.num_hidden_layers == 2
    assert planned.parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "expected a causal language model"),
        ("{", "expected a causal language model"),
        (json.dumps({"model_type": "bert"}), "expected"),
        (json.dumps({"model_type": "llama", "hidden_size": "wide"}), "expected a causal language model"),
        (json.dumps({"model_type": "mistral", "sliding_window": 512}), "config.sliding_window: expected full causal"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        read_planned(str(tmp_path))
