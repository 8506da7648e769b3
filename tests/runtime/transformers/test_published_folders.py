"""Granite and Gemma from folders as they are published: older names in config.json, weights in several files.

The models are tiny and random, saved by Transformers; only their config.json is rewritten.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

import families
from models import masked_model, padded, sparse_topology
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, SurgeonCache, load, patch
from surgeon.runtime.errors import PatchError

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 5e-5  # of fp32 logits whose largest are about 10
NEWER = ("dtype", "rope_parameters", "layer_types")
"""Names that configs written by Transformers 4 do not have."""
ALIKE: dict[str, Any] = {"torch_dtype": "float32", "rope_scaling": None}
PUBLISHED: dict[str, dict[str, Any]] = {
    "granite": ALIKE | {"rope_theta": 5e6, "attention_bias": False, "mlp_bias": False},
    "gemma2": ALIKE | {"rope_theta": 10000.0, "cache_implementation": "hybrid"},
    "gemma3": ALIKE | {"sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
}
LEFT = {"granite": [], "gemma2": [0, 2], "gemma3": [0, 1]}
"""The sliding layers: of Gemma 2 every other from the first on, of Gemma 3 all but each last of a few."""


def published(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """A family's model, read from a folder."""
    families.tiny(name).save_pretrained(folder, max_shard_size="200KB")
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in NEWER}
    file.write_text(json.dumps(config | PUBLISHED[name] | changes))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def compiled(folder: Path, name: str) -> tuple[Topology, Package]:
    topology = families.of_family(sparse_topology(), name)
    return topology, load(compile_package(topology, folder / "kernels", dtypes=("fp32",)), strict=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_patched(tmp_path: Path, name: str) -> None:
    model = published(tmp_path / "model", name)
    topology, package = compiled(tmp_path, name)
    reference = masked_model(model, topology)
    assert [layer.layer for layer in patch(model, package, recall="pattern")] == LEFT[name]
    ids, mask = padded((70, 41, 5))
    found, expected = (run(ids, attention_mask=mask).logits[mask.bool()] for run in (model, reference))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted = reference.generate(ids, **how)
    for cache in (None, SurgeonCache(package, model.config)):
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), wanted)


def test_capped_scores_are_refused(tmp_path: Path) -> None:
    """As in every published Gemma 2."""
    model = published(tmp_path / "model", "gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    with pytest.raises(PatchError, match=r"attn_logit_softcapping: expected scores that enter .*, got 50.0"):
        patch(model, compiled(tmp_path, "gemma2")[1], recall="pattern")


def test_a_model_of_text_and_images_is_refused(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: its folder names another model type, and its images see each other."""
    text = families.tiny("gemma3").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config)
    with pytest.raises(PatchError, match=r"model.config.model_type: expected 'gemma3_text', .*, got 'gemma3'"):
        patch(model, compiled(tmp_path, "gemma3")[1], recall="pattern")
