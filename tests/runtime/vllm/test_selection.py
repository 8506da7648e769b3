"""The config of a server on a GPU chooses the plugin's backend, and pages that its kernels take."""

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.selection import select_backend


class Backend(enum.Enum):
    FLASH_ATTN = "flash"
    CUSTOM = None


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm.v1.attention.backends.registry")
    module.AttentionBackendEnum = Backend  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def config(
    backend: Backend | None = None, by_kind: dict[str, Backend] | None = None, block_size: int | None = None
) -> Any:
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend, backend_per_kind=by_kind or {}),
        cache_config=SimpleNamespace(block_size=block_size or 16, user_specified_block_size=block_size is not None),
    )


@pytest.mark.parametrize(("block_size", "page"), [(64, 64), (8, 16)])
def test_a_server_that_chooses_nothing(block_size: int, page: int) -> None:
    server = config()
    select_backend(server, block_size)
    assert server.attention_config.backend is Backend.CUSTOM
    assert (server.cache_config.block_size, server.cache_config.user_specified_block_size) == (page, True)


def test_what_the_user_chose_stays() -> None:
    server = config(Backend.CUSTOM, {"sliding_window": Backend.CUSTOM}, block_size=128)
    select_backend(server, 64)
    assert server.attention_config.backend is Backend.CUSTOM
    assert server.cache_config.block_size == 128


@pytest.mark.parametrize("server", [config(Backend.FLASH_ATTN), config(by_kind={"full_attention": Backend.FLASH_ATTN})])
def test_another_backend_is_refused(server: Any) -> None:
    with pytest.raises(PatchError, match=r"vLLM's attention backend: expected CUSTOM, .*, got FLASH_ATTN; leave out"):
        select_backend(server, 64)
