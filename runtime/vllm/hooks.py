"""The places at which the plugin takes part in vLLM, each of which a version of vLLM may move.

vLLM only logs a plugin that it cannot load, and would go on densely: what is wrong with a package is therefore raised
from within vLLM's own calls, and what the plugin needs is looked up while it is registered.

Source: `vllm.platforms.interface`, Platform.check_and_update_config, called for every config of a server;
`vllm.v1.engine.core`, EngineCore.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.compatibility import covered_layers, is_taken
from surgeon.runtime.vllm.pages.prefix_hashes import Asking, marking, with_mark
from surgeon.runtime.vllm.serving import check_start, serving

GPU_BACKEND = "surgeon.runtime.vllm.gpu_backend.SurgeonGPUBackend"
CPU_BACKEND = "surgeon.runtime.vllm.cpu_backend.SurgeonCPUBackend"

_MARK = "_surgeon_hook"
_ENGINES: list[Asking | None] = [None]
"""The rows that ask in the engine that this process makes."""


def install() -> None:
    """Puts the plugin's hooks into this process; a second call changes nothing.

    In a version of vLLM that is not taken there is only the one that refuses a package.
    """
    from vllm import __version__
    from vllm.platforms import current_platform

    replace(type(current_platform), "check_and_update_config", _checking, is_class_method=True)
    if not is_taken(__version__):
        return
    if current_platform.device_type == "cpu":
        _replace_backend("CPU_ATTN", CPU_BACKEND)
        _mark_prefixes()
        _free_pages()
    elif current_platform.is_cuda():
        _replace_backend("CUSTOM", GPU_BACKEND)
        _mark_prefixes()
        _watch_backends()


def replace(owner: Any, name: str, made: Callable[[Any], Any], is_class_method: bool = False) -> None:
    """Replaces a function of a class or module by what `made` makes of it, once."""
    own = getattr(owner, name)
    if getattr(own, _MARK, False):
        return
    new = made(own)
    setattr(new, _MARK, True)
    setattr(owner, name, staticmethod(new) if is_class_method else new)


def _checking(update: Callable[[Any], Any]) -> Callable[[Any], None]:
    @wraps(update)
    def update_and_check(config: Any) -> None:
        update(config)
        check_start(config)

    return update_and_check


def _replace_backend(name: str, path: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum[name], path)


def _mark_prefixes() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    replace(kv_cache_utils, "generate_block_hash_extra_keys", with_mark)
    replace(core, "get_request_block_hasher", _hasher)
    replace(core.EngineCore, "_initialize_kv_caches", _noting_engine)


def _free_pages() -> None:
    from surgeon.runtime.vllm.freeing import register_spec

    register_spec()


def _watch_backends() -> None:
    from vllm.model_executor.layers.attention import Attention

    replace(Attention, "get_kv_cache_spec", on_own_backend)


def on_own_backend(get_kv_cache_spec: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `Attention.get_kv_cache_spec`, which refuses covered layers of a model that chooses another backend."""

    def spec_of(layer: Any, config: Any) -> Any:
        found = serving(config)
        name = layer.attn_backend.get_name()
        if found is not None and name != "CUSTOM":
            from vllm.model_executor.models.utils import extract_layer_index

            covered = covered_layers(config.model_config.hf_config, found.package.manifest)
            if extract_layer_index(layer.layer_name) in covered:
                raise PatchError(f"{layer.layer_name}: backend", "CUSTOM", name, "serve this model without a package")
        return get_kv_cache_spec(layer, config)

    return spec_of


def _noting_engine(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def note_and_initialize(engine: Any, config: Any) -> Any:
        found = serving(config)
        asks = found is not None and found.options.asking
        _ENGINES[0] = Asking(asks, found.package.manifest.block_size) if found and asks else None
        return initialize(engine, config)

    return note_and_initialize


def _hasher(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def make_marking(*arguments: Any, **options: Any) -> Any:
        asking = _ENGINES[0]
        hasher = make(*arguments, **options)
        return hasher if asking is None else marking(hasher, asking)

    return make_marking
