"""`--device-map`: a model whose weights are fetched from disk, layer by layer, learned on and piloted like any other.

A machine without a GPU has nothing else to spread a model over; the hooks that move a layer's weights are the same.
"""

import json
from pathlib import Path

import pytest
import torch

from models import sparse_topology
from surgeon.compiler import compile_package
from surgeon.compiler.cli.main import main
from surgeon.compiler.learn.learn import Effort, Request, learn
from surgeon.compiler.learn.measure import checkpoint
from surgeon.compiler.learn.measure.checkpoint import read_model
from surgeon.compiler.learn.texts.text import read_text
from surgeon.compiler.learn.ultrametric.descent import Settings
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime import fingerprint
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.pilot.pilot_file import read_pilot
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.evaluate.processes import Processes
from surgeon.runtime.transformers.offload import entry_device, weight_stores

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
REQUEST = Request(density=0.5, length=128, block_size=16, cuts=True)
DESCENT = Request(density=0.5, length=128, block_size=16, method="ultrametric", settings=Settings(steps=6))
EFFORT = Effort(calibrate=1, validate=1, refine=(1,), cuts=1)

pytestmark = pytest.mark.usefixtures("one_thread")


def on_disk(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("request_", [REQUEST, DESCENT], ids=lambda request: request.method)
def test_it_learns_the_same_from_disk_and_keeps_nothing_in_memory(folder: Path, request_: Request) -> None:
    whole, tokenizer = read_model(str(folder / "model"))
    texts = [read_text(folder / name, tokenizer) for name in ("a.txt", "b.txt")]
    expected = learn(whole, texts, request_, EFFORT)
    for device_map in ({"": "disk"}, SPLIT):
        model, _ = read_model(str(folder / "model"), device_map)
        before = on_disk(model)
        assert "model.layers.2.mlp.down_proj.weight" in before
        found = learn(model, texts, request_, EFFORT)
        assert found.sha256 == expected.sha256
        for figure in ("validation", "weights_sha256"):
            assert found.provenance[figure] == expected.provenance[figure]
        assert on_disk(model) == before


def test_twins_fetch_from_the_same_store_and_keep_their_own_settings(folder: Path) -> None:
    model, _ = read_model(str(folder / "model"), SPLIT)
    other = twin(model)
    assert all(one is same for one, same in zip(weight_stores(model), weight_stores(other), strict=True))
    assert other.model.layers[1].self_attn.q_proj.forward.args[0] is other.model.layers[1].self_attn.q_proj
    assert fingerprint(other) == fingerprint(model)
    assert entry_device(read_model(str(folder / "model"), {"": "disk"})[0]) == torch.device("cpu")


def test_the_commands_take_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",))
    texts = [str(folder / "model"), "--text", str(folder / "a.txt"), "--text", str(folder / "b.txt")]
    size = ["--length", "96", "--sequences", "1", "--tasks", "0", "--max-ppl-ratio", "50", "--rounds", "1"]
    figures = []
    for name, more in (("whole", []), ("split", ["--device-map", json.dumps(SPLIT)])):
        out = tmp_path / f"{name}.json"
        assert main(["pilot", *texts, str(package), *size, "--out", str(out), *more]) == 0
        columns = read_pilot(out).columns
        figures.append([(each.perplexity, each.kept_cache_bytes, each.weights_sha256) for each in columns])
        assert len(columns) == 4
    assert figures[0] == figures[1]

    measured = ["--density", "0.5", "--length", "128", "--block", "16"]
    assessed = []
    for device_map in ("cpu", "auto", '{"": "disk"}'):
        capsys.readouterr()
        assert main(["assess", *texts, *measured, "--json", "--device-map", device_map]) == 0
        assessed.append(capsys.readouterr().out)
    assert assessed[0] == assessed[1] == assessed[2]
    learned = ["--method", "window", "--out", str(tmp_path / "w.json"), "--device-map", '{"": "disk"}']
    assert main(["learn", *texts, *measured, *learned]) == 0
    assert read_topology(tmp_path / "w.json").provenance["weights_sha256"] == figures[0][0][2]


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ('{"": "disk"', "expected a name, or a JSON object"),
        ('{"": [0]}', "expected a name, or a JSON object"),
        ("[0]", "--device-map: expected devices that exist, got "),
        ('{"": "nowhere"}', "--device-map: expected devices that exist, got "),
        ("cuda:99", "--device-map: expected devices that exist, got 'cuda:99: "),
    ],
)
def test_what_cannot_be_placed_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], device_map: str, message: str
) -> None:
    command = ["assess", str(folder / "model"), "--text", str(folder / "a.txt"), "--device-map", device_map]
    assert main([*command, "--length", "128", "--block", "16", "--density", "0.5"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_several_processes_take_a_device_for_the_whole_model_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "all_processes", lambda: Processes(0, 2))
    for device_map in ("auto", SPLIT):
        with pytest.raises(ModelError, match="--device-map: expected one device for the model of each process, got"):
            read_model(str(folder / "model"), device_map)
    read_model(str(folder / "model"), "cpu")
