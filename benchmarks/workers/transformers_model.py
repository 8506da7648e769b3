"""Transformers: as it comes, or patched with packages; eager or compiled; in a dtype, or with linear layers in int8."""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from inputs.checkpoints import load_model
from surgeon.runtime import load as load_package
from surgeon.runtime import patch
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.transformers.cache import CACHE_NAME
from workers.engine import OnToken

Forward = Callable[..., Any]


@dataclass(frozen=True)
class TransformersModel:
    """Forward passes by the longest sequence that each is for, the model's config, and its libraries' versions."""

    forwards: Mapping[int, Forward]
    config: Any
    versions: Mapping[str, str]

    @torch.inference_mode()
    def generate(self, prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        """Continues a prompt, one token a step, with a cache that grows."""
        forward = self.forwards[min(length for length in self.forwards if length >= len(prompt) + new_tokens)]
        cache, ids = DynamicCache(config=self.config), torch.tensor([prompt])
        for _ in range(new_tokens):
            logits = forward(input_ids=ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits
            ids = logits[:, -1:].argmax(-1)
            on_token(int(ids))


def load(
    folder: str,
    threads: int,
    longest: int,
    dtype: str,
    packages: Mapping[str, str] | None = None,
    compiled: bool = False,
    int8: bool = False,
) -> TransformersModel:
    """Loads the model in `folder`, and patches a twin of it with each of the packages, by the length that it is for.

    `int8` has torchao keep the weights of linear layers in int8 and round their inputs to int8.
    """
    torch.set_num_threads(threads)
    model = load_model(Path(folder), getattr(torch, dtype))
    libraries = ["torch", "transformers"]
    if int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        libraries.append("torchao")
    models = {longest: model}
    if packages is not None:
        models = {int(length): _patched(model, package) for length, package in packages.items()}
        libraries.append("surgeon-compile")
    forwards: dict[int, Forward] = dict(models)
    if compiled:
        forwards = {length: torch.compile(each, dynamic=True) for length, each in models.items()}
    return TransformersModel(forwards, model.config, {name: importlib.metadata.version(name) for name in libraries})


def _patched(model: PreTrainedModel, package: str) -> PreTrainedModel:
    other = twin(model)
    patch(other, load_package(package, strict=True), recall="dense")
    return other
