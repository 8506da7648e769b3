"""The model that a topology is learned on: read, checked, and frozen."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from surgeon.compiler.learn.measure.checkpoint_files import SPREADING, DeviceMap, check_devices, check_files
from surgeon.runtime.errors import ModelError, reason_of, remedy_for, short_repr
from surgeon.runtime.evaluate.processes import all_processes
from surgeon.runtime.installation import required
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.transformers.layers import find_attention, layer_of

_REMEDY = "use a Llama or another decoder with full attention"


def read_model(
    name: str, device_map: DeviceMap | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads an fp32 model that a topology can be learned for, and its tokenizer; arguments as in `read_checkpoint`.

    Raises:
        ModelError: it cannot be read, or is not a decoder that a topology can describe.
    """
    model, tokenizer = read_checkpoint(name, torch.float32, device_map, tokenizer)
    check_decoder(model)
    return model, tokenizer


def read_checkpoint(
    name: str,
    dtype: torch.dtype,
    device_map: DeviceMap | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads a model and its tokenizer: `name` is a folder, a GGUF file, or a name that Transformers can resolve.

    A `tokenizer` that has been read is not read again. Without a `device_map` the model is on the CPU. Each of several
    processes has a whole model, on a device of its own.

    Raises:
        ModelError: it cannot be read or placed as requested, or a required package is missing.
    """
    check_placement(device_map)
    where, options = located(name)
    check_files(Path(name))
    check_devices(device_map)
    try:
        with _without_warnings():  # what they would say of missing weights, we say below
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(where, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, device_map=device_map, output_loading_info=True, **options
            )
            model, found = cast(tuple[PreTrainedModel, Mapping[str, Collection[str]]], loaded)
    except Exception as error:  # each format's library raises classes of its own
        raise unreadable(name, error) from None
    _check_complete(name, found["missing_keys"])
    return model, tokenizer


def check_placement(device_map: DeviceMap | None) -> None:
    """Checks that models may be placed as a `device_map` says, before one is read.

    Raises:
        ModelError: several processes would share one model's devices, or accelerate is missing.
    """
    processes = all_processes().count
    if processes > 1 and (device_map in SPREADING or isinstance(device_map, Mapping)):
        raise ModelError(
            "--device-map",
            "one device for the model of each process",
            f"{short_repr(device_map)} in {processes} processes",
            "start one process, or name a device",
        )
    if device_map is not None:
        required("accelerate", ModelError, "--device-map", "leave it out")


def located(name: str) -> tuple[str | Path, dict[str, Any]]:
    """The arguments of `from_pretrained` for a folder, a GGUF file, or a name that Transformers can resolve.

    Raises:
        ModelError: a package that reads GGUF files is missing.
    """
    if Path(name).suffix.lower() != ".gguf":
        return name, {}
    for package in ("gguf", "accelerate"):  # Transformers needs both
        required(package, ModelError, name)
    return Path(name).parent, {"gguf_file": Path(name).name}


def unreadable(name: str, error: Exception) -> ModelError:
    """The error for a model that Transformers cannot read, whatever it raises."""
    return ModelError(
        name,
        "a causal language model with its tokenizer",
        short_repr(reason_of(error), 200),
        remedy_for(error, "check the path or the name, and that all files are whole"),
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_complete(name: str, missing: Collection[str]) -> None:
    """Refuses a checkpoint without some of the weights, in whose place there would be random ones.

    A weight that is tied to another is not missed: the library leaves it out.
    """
    if missing:
        first, more = min(missing), len(missing) - 1
        raise ModelError(
            name,
            "all weights of the model that its config.json describes",
            f"none for {first}" + (f" and {more} more" if more else ""),
            "complete the checkpoint, or correct the names of its weights",
        )


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Holds the model in evaluation mode, without gradients for its weights; restores both settings afterwards."""
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_()


def check_decoder(model: torch.nn.Module) -> None:
    """Checks that every layer is full causal attention through Transformers' interface, with weights in memory.

    Raises:
        ModelError: a layer is not.
    """
    if not isinstance(model, PreTrainedModel) or not getattr(type(model), "_supports_attention_backend", False):
        raise ModelError(
            type(model).__name__, "a model whose attention goes through AttentionInterface", "another", _REMEDY
        )
    for name in ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(model.config, name, None)
        if value is not None:
            raise ModelError(f"config.{name}", "full causal attention, so None", short_repr(value), _REMEDY)
    for layer, kind in enumerate(getattr(model.config, "layer_types", None) or ()):
        if kind != "full_attention":
            raise ModelError(f"config.layer_types[{layer}]", "'full_attention'", short_repr(kind), _REMEDY)
    modules = [module for _, module in find_attention(model)]
    layers = getattr(model.config, "num_hidden_layers", None)
    if (found := [layer_of(module) for module in modules]) != list(range(layers or 0)) or not modules:
        raise ModelError(
            type(model).__name__,
            f"one attention module in each of {layers} layers",
            f"those of layers {short_repr(found)}",
            _REMEDY,
        )
    for module in modules:
        if not module.is_causal or not isinstance(getattr(module, "o_proj", None), torch.nn.Linear):
            raise ModelError(
                f"attention of layer {layer_of(module)}",
                "causal attention with an output projection o_proj",
                "another",
                _REMEDY,
            )
    if model.get_output_embeddings() is None:
        raise ModelError(type(model).__name__, "a model with a language-model head", "one without", _REMEDY)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The model's shape as a topology states it, for any weights."""
    config = model.config
    heads = config.num_attention_heads
    return ModelShape(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        weights_sha256=None,
    )
