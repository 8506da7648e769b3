"""A real pretrained Llama on compiled kernels: SmolLM2-135M-Instruct against itself, and against explicit masks."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import demo
from inputs.checkpoints import SMOLLM2_135M, UnreachableError, load_model, load_tokenizer, model_folder
from inputs.texts import SHIPPED, Text
from models import masked_model
from surgeon.compiler import Topology, compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime import Package, fingerprint, load, patch, trace, unpatch, weights_id
from topologies import dense_topology, one_cluster_topology

pytestmark = [pytest.mark.model, pytest.mark.slow]

USER_CACHE = cache_folder()  # before the tests' own cache takes its place: the model is fetched once a user
ROOT = Path(__file__).parents[1]
TOPOLOGIES = ROOT / "benchmarks" / "topologies"
SHAPE: dict[str, Any] = {
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "block_size": 64,
    "num_blocks": 32,
}
TOLERANCE = 1e-3
NEW_TOKENS = 32
PADDING = 2  # the model's own


@pytest.fixture(scope="module")
def files() -> Path:
    try:
        return model_folder(SMOLLM2_135M, USER_CACHE)
    except UnreachableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(files: Path) -> Iterator[LlamaForCausalLM]:
    """The model, whose weights no test of this file may change."""
    model = cast(LlamaForCausalLM, load_model(files))
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before


@pytest.fixture(scope="module")
def tokenizer(files: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(files)


@pytest.fixture(scope="module")
def story(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The shipped text as token ids, `[length]`."""
    tokens: torch.Tensor = tokenizer(SHIPPED.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    return tokens


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Topology], Package]:
    """Compiles a topology in fp32 and loads it."""

    def make(topology: Topology) -> Package:
        return load(
            compile_package(topology, tmp_path_factory.mktemp("kernels") / "package", dtypes=["fp32"]), strict=True
        )

    return make


@torch.inference_mode()
def both_ways_in(
    model: LlamaForCausalLM, package: Package, ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The model's logits on the package's kernels, through `patch` and through `trace`."""
    patch(model, package, recall="pattern")
    try:
        patched = model(input_ids=ids, attention_mask=mask).logits
    finally:
        unpatch(model)
    return {"patch": patched, "trace": trace(model, package, recall="pattern")(ids, mask)}


def padded(story: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Different parts of the story of these lengths, padded on the left, and their attention mask."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PADDING)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = story[500 * row : 500 * row + length]
        mask[row, longest - length :] = 1
    return ids, mask


def test_the_shipped_topologies_are_for_these_weights(model: LlamaForCausalLM) -> None:
    files = sorted(TOPOLOGIES.glob("smollm2-*.json"))
    assert len(files) > 5
    assert {read_topology(file).model.weights_sha256 for file in files} == {weights_id(model)}


@pytest.mark.parametrize("collapsed", [dense_topology, one_cluster_topology])
def test_a_collapsed_topology_gives_the_models_own_logits(
    model: LlamaForCausalLM,
    story: torch.Tensor,
    package: Callable[[Topology], Package],
    collapsed: Callable[..., Topology],
) -> None:
    ids, mask = padded(story, (300, 211))
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
    for way, logits in both_ways_in(model, package(collapsed(**SHAPE)), ids, mask).items():
        assert (logits - expected)[mask.bool()].abs().max() < TOLERANCE, way


def test_a_topology_of_trees_agrees_with_explicit_masks(
    model: LlamaForCausalLM, story: torch.Tensor, package: Callable[[Topology], Package]
) -> None:
    topology = read_topology(TOPOLOGIES / "smollm2-135m-trees.json")
    ids, mask = padded(story, (700, 555))
    with torch.inference_mode():
        dense = model(input_ids=ids, attention_mask=mask).logits
        expected = masked_model(model, topology)(input_ids=ids, attention_mask=mask).logits
    assert (dense - expected)[mask.bool()].abs().max() > 1  # the masks do hide something
    for way, logits in both_ways_in(model, package(topology), ids, mask).items():
        assert (logits - expected)[mask.bool()].abs().max() < TOLERANCE, way


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_on_a_collapsed_topology_is_the_models_own(
    model: LlamaForCausalLM, story: torch.Tensor, package: Callable[[Topology], Package], cache: str
) -> None:
    ids, mask = padded(story, (40, 150, 260))

    def generated() -> torch.Tensor:
        generate = cast(Any, model).generate
        tokens: torch.Tensor = generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            cache_implementation=cache,
        )
        return tokens[:, ids.shape[1] :]

    expected = generated()
    patch(model, package(dense_topology(**SHAPE)), recall="pattern")
    try:
        found = generated()
    finally:
        unpatch(model)
    assert found.shape == (3, NEW_TOKENS)
    assert torch.equal(found, expected)


def test_weights_are_shared_and_unchanged(
    model: LlamaForCausalLM, story: torch.Tensor, package: Callable[[Topology], Package]
) -> None:
    before = fingerprint(model)
    kernels = package(read_topology(TOPOLOGIES / "smollm2-135m-trees.json"))
    graph = trace(model, kernels, recall="pattern")
    patch(model, kernels, recall="pattern")
    try:
        assert fingerprint(model) == before
        model(story[None, :100])
    finally:
        unpatch(model)
    assert fingerprint(model) == fingerprint(graph) == before
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in graph.parameters()} == shared


def test_the_topology_compiles_from_nothing_and_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    topology = read_topology(TOPOLOGIES / "smollm2-135m-25.json")
    seconds, packages, parts = [], [], []
    for name in ("first", "second"):
        started = time.perf_counter()
        folder = compile_package(topology, tmp_path / name)
        seconds.append(time.perf_counter() - started)
        packages.append({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
        parts.append({file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*")})  # a new one is another
    with capsys.disabled():
        print(f"\nsmollm2-135m-25.json for cpu: {seconds[0]:.1f} s from nothing, {seconds[1]:.2f} s from the cache")
    assert packages[0] == packages[1]
    assert parts[0] == parts[1]
    assert parts[0]


def test_the_readmes_python_runs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shutil.copy(TOPOLOGIES / "smollm2-135m-25.json", tmp_path / "topology.json")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/llama", str(files)), names)
    tokens = torch.arange(100)[None]
    with torch.inference_mode():
        patched = names["model"](tokens).logits
        unpatch(names["model"])
        torch.testing.assert_close(patched, names["model"](tokens).logits, atol=TOLERANCE, rtol=0)


def test_the_demo_runs_to_its_end(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "model_folder", lambda *_: files)
    monkeypatch.setattr(demo, "real_text", lambda *_: Text("story", SHIPPED.read_text(encoding="utf-8")))
    for name, value in (
        ("LEARNED", {100: "smollm2-135m-25", 200: "smollm2-135m-25"}),
        ("TOKENS_SCORED", 200),
        ("REPEATS", 1),
        ("NEW_TOKENS", 2),
    ):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "TREE_TOKENS", 150)
    assert demo.main([]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"200 │ +9\d\.\d%", shown)
    differences = [float(found) for found in re.findall(r"(?:patched|traced)  (\S+) where", shown)]
    assert len(differences) == 2
    assert max(differences) < TOLERANCE
    assert re.search(r"weights: *\s[0-9a-f]{64}, unchanged", shown)
    hidden = shown[shown.index("A number hidden in the first half") :]
    assert "pattern alone" in hidden
    assert len(re.findall(r"│ +\d{5} │", hidden)) == 3
