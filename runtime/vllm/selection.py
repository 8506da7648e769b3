"""The choice of the plugin's backend on a GPU, and of pages that its kernels take: written into a server's config.

Source: `vllm.config.attention`, AttentionConfig; `vllm.config.cache`, CacheConfig.
"""

from typing import Any

from surgeon.runtime.errors import PatchError

LEAST_PAGE = 16
"""The fewest tokens in a page of vLLM's own GPU kernels, which run the other layers."""


def select_backend(config: Any, block_size: int) -> None:
    """Makes a server's VllmConfig choose the backend CUSTOM, and pages of a block where the user names none.

    Raises:
        PatchError: the user has chosen another backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, cache = config.attention_config, config.cache_config
    for backend in (attention.backend, *attention.backend_per_kind.values()):
        if backend not in (None, AttentionBackendEnum.CUSTOM):
            raise PatchError(
                "vLLM's attention backend",
                "CUSTOM, under which the plugin's is registered",
                backend.name,
                "leave out --attention-backend, or serve without a package",
            )
    attention.backend = AttentionBackendEnum.CUSTOM
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = max(LEAST_PAGE, block_size), True
