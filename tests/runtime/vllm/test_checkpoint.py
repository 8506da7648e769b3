"""The identity of a checkpoint on disk is that of the model that is loaded from it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models import tiny_config, tiny_llama
from surgeon.runtime import weights_id
from surgeon.runtime.errors import ModelError, PatchError
from surgeon.runtime.vllm.checkpoint import check_weights, checkpoint_id


def saved(model: LlamaForCausalLM, folder: Path, **options: Any) -> list[Path]:
    model.save_pretrained(folder, **options)
    return sorted(folder.glob("*.safetensors"))


def check(folder: Path, expected: str, load_format: str = "auto") -> None:
    model = SimpleNamespace(model=str(folder), revision=None, hf_config=tiny_config())
    check_weights(model, SimpleNamespace(load_format=load_format, download_dir=None), expected)


def test_it_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    model = tiny_llama()
    assert checkpoint_id(saved(model, tmp_path), model.config) == weights_id(model)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = tiny_llama(tiny_config(tie_word_embeddings=True))
    assert checkpoint_id(saved(model, tmp_path), model.config) == weights_id(model)


def test_weights_over_several_files_in_another_dtype(tmp_path: Path) -> None:
    model = tiny_llama()
    files = saved(tiny_llama().to(torch.bfloat16), tmp_path, max_shard_size="100KB")
    assert len(files) > 2
    assert checkpoint_id(files, model.config) == weights_id(model)


def test_only_the_first_elements_are_read_where_more_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = tiny_llama(), weights_id(tiny_llama())
    monkeypatch.setattr("surgeon.runtime.transformers.fingerprint.SIGNS", 1000)
    monkeypatch.setattr("surgeon.runtime.vllm.checkpoint.SIGNS", 1000)
    found = checkpoint_id(saved(model, tmp_path), model.config)
    assert found == weights_id(model) != whole


def test_quantised_weights_leave_the_embedding(tmp_path: Path) -> None:
    model = tiny_llama()
    (file,) = saved(model, tmp_path)
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, file)
    assert checkpoint_id([file], model.config) == weights_id(model)[:32] + 32 * "f"


def test_the_topologys_weights_pass_and_others_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    saved(model, tmp_path)
    check(tmp_path, weights_id(model))
    with pytest.raises(PatchError, match="weights: expected those that the topology was learned on, SHA-256 "):
        check(tmp_path, weights_id(tiny_llama(seed=1)))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_do_not_tell_are_refused(tmp_path: Path, load_format: str) -> None:
    if load_format == "dummy":
        saved(tiny_llama(), tmp_path)
    with pytest.raises(PatchError, match=r"expected \*\.safetensors of the weights.*got none; serve those weights"):
        check(tmp_path, 64 * "0", load_format)


def test_tensors_of_other_names_tell_nothing(tmp_path: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(PatchError, match=f"got {64 * 'f'}"):
        check(tmp_path, 64 * "0")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="expected a file of safetensors"):
        check(tmp_path, 64 * "0")
