"""The identity of a checkpoint's weights, taken from its files: vLLM fuses and splits what it loads."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from surgeon.runtime.errors import ModelError, PatchError, reason_of
from surgeon.runtime.transformers.fingerprint import NOTHING_TOLD, SIGNS, same_weights, stored_weights_id

_FILES = "*.safetensors"
_FLOATS = ("F64", "F32", "BF16", "F16")


def check_weights(model_config: Any, load_config: Any, expected: str) -> None:
    """Checks that a server's checkpoint has the weights that a topology was learned on.

    Raises:
        PatchError: it has others, or no safetensors that would tell.
        ModelError: the checkpoint cannot be read.
    """
    remedy = (
        "serve those weights, in any dtype, or set model.weights_sha256 to null, for any weights, and compile again"
    )
    folder = _folder_of(model_config, load_config)
    files = sorted(folder.glob(_FILES)) if load_config.load_format in ("auto", "hf", "safetensors") else []
    if not files:
        raise PatchError(
            f"{folder}", f"{_FILES} of the weights that the topology was learned on, SHA-256 {expected}", "none", remedy
        )
    found = checkpoint_id(files, model_config.hf_config)
    if found == NOTHING_TOLD or not same_weights(found, expected):
        raise PatchError("weights", f"those that the topology was learned on, SHA-256 {expected}", found, remedy)


def checkpoint_id(files: list[Path], config: Any) -> str:
    """The `weights_id` of the model of this config in these files; a half that they do not tell is 32 times f.

    Raises:
        ModelError: a file cannot be read.
    """
    with _opened(files) as tensors:
        return stored_weights_id(
            config, lambda name: _first_elements(tensors[name].get_slice(name)) if name in tensors else None
        )


def _first_elements(stored: Any) -> torch.Tensor | None:
    if stored.get_dtype() not in _FLOATS:
        return None
    shape = stored.get_shape()
    rows = -(-SIGNS // max(1, math.prod(shape[1:])))
    first: torch.Tensor = stored[: min(rows, shape[0])] if shape else stored[...]
    return first


@contextmanager
def _opened(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The open file of each tensor, by name."""
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except Exception as error:  # whatever the library says of a damaged file
                raise ModelError(str(file), "a file of safetensors", reason_of(error), "fetch it again") from error
            tensors |= dict.fromkeys(opened.keys(), opened)
        yield tensors


def _folder_of(model_config: Any, load_config: Any) -> Path:
    """The folder of the server's checkpoint, fetched from the Hub if it is not one on this machine."""
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    try:
        found = download_weights_from_hf(
            model_config.model, load_config.download_dir, [_FILES], revision=model_config.revision
        )
    except Exception as error:  # of the Hub's client and of the network below it
        raise ModelError(
            model_config.model, "a checkpoint that can be fetched", reason_of(error), "check the name, or name a folder"
        ) from error
    return Path(found)
