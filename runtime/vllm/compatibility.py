"""Checks that a package can serve the model of a vLLM server, all made before the server starts.

They need the config alone, so that a bad package ends the server at once, in its first process.

Source: `vllm.config`, VllmConfig.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.kernels.gpu.load import no_pages, paged_dtypes
from surgeon.runtime.kernels.gpu.targets import choose_target
from surgeon.runtime.loading import Package
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.target import Target
from surgeon.runtime.transformers.compatibility import check_config
from surgeon.runtime.transformers.layers import FULL, layer_type

ANY_VERSION = "SURGEON_VLLM_ANY_VERSION"
"""The environment variable that, set to 1, takes vLLM's versions that the plugin was not tested with."""

TESTED = ((0, 32), (0, 33))
"""The first version of vLLM that the plugin was tested with, and the first one behind them."""


def is_taken(version: str) -> bool:
    """True for a version of vLLM that the plugin was tested with, or that the environment says to try."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return TESTED[0] <= numbers < TESTED[1] or os.environ.get(ANY_VERSION) == "1"


def check_version(version: str) -> None:
    """Refuses a version of vLLM that is not taken.

    Raises:
        PatchError: it is another one.
    """
    if not is_taken(version):
        first, end = (".".join(map(str, each)) for each in TESTED)
        raise PatchError(
            "vLLM", f"version {first} or newer, below {end}", version, f"install one, or set {ANY_VERSION}=1 to try it"
        )


def check_server(config: Any, package: Package, own: Target) -> None:
    """Checks that a server of this VllmConfig, on a device of this target, can run on the package's kernels.

    Raises:
        PatchError: it cannot; the message describes the first fault.
        TargetError: the package has no kernels for the device.
    """
    shape = package.manifest.model
    hf_config = config.model_config.hf_config
    check_config(hf_config, shape)
    covered_layers(hf_config, package.manifest)
    if own.backend != "cpu" and package.manifest.routed:
        raise PatchError(
            "surgeon_package",
            "a package without routed heads: the plugin does not run these on GPUs yet",
            f"routed heads in layer {package.manifest.routed[0]}",
            "serve on a CPU, or compile a topology without routes",
        )
    _check_kernels(config, package, own)
    _check_pages(config.cache_config, package.manifest.block_size, own)
    _check_lengths(config.model_config, package.manifest)
    _check_parallel(config.parallel_config, shape.num_key_value_heads)
    _check_features(config)


def covered_layers(hf_config: Any, manifest: Manifest) -> tuple[int, ...]:
    """The layers of full attention that the package covers, which run on its kernels.

    Raises:
        PatchError: there are none.
    """
    covered = tuple(layer for layer in manifest.layers if layer_type(hf_config, layer) == FULL)
    if not covered:
        types = sorted({layer_type(hf_config, layer) for layer in range(hf_config.num_hidden_layers)})
        raise PatchError(
            "vLLM's model",
            f"full attention in one of the layers {short_repr(manifest.layers)} that the package covers",
            ", ".join(types),
            "learn a topology for the layers of full attention",
        )
    return covered


def _kernel_dtypes(package: Package, own: Target) -> tuple[torch.dtype, ...]:
    """The dtypes of the kernels that a server on such a device would run on.

    Raises:
        TargetError: the package has none.
    """
    if own.backend == "cpu":
        return package.dtypes_on("cpu")
    target = choose_target(package.manifest, own, "surgeon_package")
    dtypes = paged_dtypes(package.manifest, target)
    if not dtypes:
        raise no_pages("surgeon_package", f"none for {target}")
    return dtypes


def _check_kernels(config: Any, package: Package, own: Target) -> None:
    model, cache = config.model_config, config.cache_config
    dtypes = _kernel_dtypes(package, own)
    if model.dtype not in dtypes:
        raise PatchError(
            "vLLM's dtype",
            "that of the package's kernels, " + " or ".join(_names(dtypes)),
            _names([model.dtype])[0],
            f"serve with --dtype {_names(dtypes)[0]}, or compile the package with that --dtype",
        )
    if cache.cache_dtype not in ("auto", *_names([model.dtype])):
        raise PatchError(
            "vLLM's cache",
            "keys and values in the model's dtype",
            short_repr(cache.cache_dtype),
            "leave out --kv-cache-dtype",
        )


def _check_pages(cache: Any, block: int, own: Target) -> None:
    size = cache.block_size
    if own.backend != "cpu" and not cache.user_specified_block_size:
        return  # the plugin chooses
    wants_power = own.backend != "cpu" and size & (size - 1)
    if size % block or wants_power:
        power = " and a power of two" if own.backend != "cpu" else ""
        raise PatchError(
            "vLLM's pages",
            f"a multiple of {block} tokens, the package's block{power}",
            f"{size} tokens",
            f"serve with --block-size {max(64, block)}",
        )


def _check_lengths(model: Any, manifest: Manifest) -> None:
    tokens = manifest.num_blocks * manifest.block_size
    if manifest.beyond == "error" and model.max_model_len > tokens:
        raise PatchError(
            "vLLM's longest request",
            f"at most {tokens} tokens, which the topology covers (beyond: error)",
            f"{model.max_model_len} tokens",
            f'serve with --max-model-len {tokens}, or compile a topology with "beyond" set to "window" or "dense"',
        )


def _check_parallel(parallel: Any, kv_heads: int) -> None:
    ranks = parallel.tensor_parallel_size
    if kv_heads % ranks:
        raise PatchError(
            "vLLM's tensor parallelism", f"a divisor of the model's {kv_heads} KV heads", str(ranks), "use fewer ranks"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise PatchError(
                f"vLLM's {name}", "1: kernels read whole sequences", str(size), "split heads with tensor parallelism"
            )
    if getattr(parallel, "use_ubatching", False):
        raise PatchError("vLLM's micro-batches", "none", "some", "leave out --enable-dbo")


def _check_features(config: Any) -> None:
    refused = {
        "speculative decoding": (config.speculative_config, "leave out --speculative-config"),
        "a KV connector": (config.kv_transfer_config, "leave out --kv-transfer-config: pages have another order"),
        "model runner V2": (config.use_v2_model_runner, "set VLLM_USE_V2_MODEL_RUNNER=0"),
    }
    for name, (value, remedy) in refused.items():
        if value:
            raise PatchError("vLLM", f"a server without {name}", "one with it", remedy)


def _names(dtypes: Sequence[Any]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]
