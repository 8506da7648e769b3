"""A server whose package cannot be used ends at its start, with one line that says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from engines import LONGEST, World
from models import tiny_config, tiny_llama
from surgeon.runtime import weights_id
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.vllm.options import PACKAGE_VARIABLE


def start(model: Path, additional_config: dict[str, Any], **options: Any) -> Any:
    """The config of a server that starts; everything of ours is checked while it is made."""
    from vllm import EngineArgs

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": LONGEST,
        "block_size": 64,
        "enforce_eager": True,
    }
    arguments = EngineArgs(model=str(model), additional_config=additional_config, **(settings | options))
    return arguments.create_engine_config()


def refusal(model: Path, package: Path | str, **options: Any) -> str:
    with pytest.raises(SurgeonError) as refused:
        start(model, {"surgeon_package": str(package)}, **options)
    return str(refused.value)


def test_other_processes_are_told_what_was_checked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.packages["mixed"].parent)
    monkeypatch.setenv(PACKAGE_VARIABLE, "mixed")
    config = start(world.folder, {"surgeon_recall": "pattern"}).additional_config
    assert config["surgeon_package"] == str(world.packages["mixed"].resolve())
    assert config["surgeon_recall"] == "pattern"
    monkeypatch.delenv(PACKAGE_VARIABLE)
    again = start(world.folder, dict(config))
    assert again.additional_config == config
    shutil.copytree(world.packages["some"], world.packages["mixed"].parent / "other")
    changed = config | {"surgeon_package": "other"}
    with pytest.raises(SurgeonError, match=r"expected the package '.*; use the package that was meant"):
        start(world.folder, changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 16}, "vLLM's pages: expected a multiple of 32 tokens, the package's block, got 16 tokens"),
        ({"dtype": "bfloat16"}, "vLLM's dtype: expected that of the package's kernels, float32, got bfloat16"),
        ({"kv_cache_dtype": "fp8"}, "vLLM's cache: expected keys and values in the model's dtype, got 'fp8'"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
            "vLLM: expected a server without speculative decoding, got one with it; leave out --speculative-config",
        ),
    ],
)
def test_settings_that_kernels_do_not_take(world: World, options: dict[str, Any], message: str) -> None:
    assert message in refusal(world.folder, world.packages["mixed"], **options)


def test_a_missing_package(world: World, tmp_path: Path) -> None:
    assert refusal(world.folder, tmp_path / "none").endswith(
        "none: expected a package folder, got nothing; check the path"
    )


def test_a_damaged_package(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.packages["mixed"], tmp_path / "copy")
    with (copy / "topology.json").open("a") as file:
        file.write(" ")
    assert "topology.json: expected " in refusal(world.folder, copy)


def test_another_models_package(world: World, tmp_path: Path) -> None:
    tiny_llama(tiny_config(num_hidden_layers=3, max_position_embeddings=LONGEST)).save_pretrained(tmp_path)
    assert "model.config.num_hidden_layers: expected 4, as the package was compiled for, got 3" in refusal(
        tmp_path, world.packages["mixed"]
    )


def test_the_weights_are_those_of_the_topology(world: World, tmp_path: Path) -> None:
    config = start(world.folder, {"surgeon_package": str(world.packages["learned"])})
    assert config.additional_config["surgeon_package"] == str(world.packages["learned"].resolve())
    other = tiny_llama(world.model.config, seed=1)
    other.save_pretrained(tmp_path)
    assert f"got {weights_id(other)}; serve those weights" in refusal(tmp_path, world.packages["learned"])


def test_an_untested_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.47.1")
    assert "vLLM: expected version 0.32 or newer, below 0.33, got 0.47.1" in refusal(
        world.folder, world.packages["mixed"]
    )


def test_a_server_ends_with_one_line(world: World, tmp_path: Path) -> None:
    options = ["--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "1024", "--block-size", "64"]
    config = json.dumps({"surgeon_package": str(tmp_path / "none")})
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.folder)]
    done = subprocess.run(
        [*server, *options, "--additional-config", config], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("surgeon: ")]
    assert said == [f"surgeon: {tmp_path / 'none'}: expected a package folder, got nothing; check the path"]
