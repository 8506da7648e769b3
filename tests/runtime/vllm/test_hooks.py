"""The plugin in a vLLM that it does not know: it changes nothing, and refuses a package."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from models import Compiled, tiny_config
from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm import register
from surgeon.runtime.vllm.hooks import on_own_backend
from surgeon.runtime.vllm.options import Options
from surgeon.runtime.vllm.serving import Serving


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The platform of a vLLM of the future, of which nothing is known but how configs are checked."""

    class Platform:
        device_type = "cpu"
        updated: list[Any] = []  # noqa: RUF012 - of this test's class

        @classmethod
        def check_and_update_config(cls, config: Any) -> None:
            cls.updated.append(config)

    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.__version__ = "0.99.0"  # type: ignore[attr-defined]
    platforms.current_platform = Platform()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return platforms.current_platform


def test_a_covered_layer_on_another_backend_is_refused(
    compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = ModuleType("vllm.model_executor.models.utils")
    utils.extract_layer_index = lambda name: int(name.rpartition(".")[2])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    found: Any = Serving(compiled["sparse"].package, Options("kernels"))
    monkeypatch.setattr("surgeon.runtime.vllm.hooks.serving", lambda _config: found)
    spec_of = on_own_backend(lambda layer, _config: f"spec of {layer.layer_name}")
    model = SimpleNamespace(model_config=SimpleNamespace(hf_config=tiny_config()))

    def layer(name: str, backend: str) -> Any:
        return SimpleNamespace(layer_name=name, attn_backend=SimpleNamespace(get_name=lambda: backend))

    assert spec_of(layer("layers.0", "CUSTOM"), model) == "spec of layers.0"
    assert spec_of(layer("layers.7", "FLASH_ATTN"), model) == "spec of layers.7"
    with pytest.raises(
        PatchError, match=r"layers\.0: backend: expected CUSTOM, got FLASH_ATTN; serve this model without"
    ):
        spec_of(layer("layers.0", "FLASH_ATTN"), model)
    found = None
    assert spec_of(layer("layers.0", "FLASH_ATTN"), model) == "spec of layers.0"


def config(**options: Any) -> Any:
    return SimpleNamespace(model_config=object(), additional_config=options)


def test_without_a_package_an_unknown_version_serves_as_ever(platform: Any) -> None:
    register()
    register()
    platform.check_and_update_config(config())
    assert len(platform.updated) == 1


def test_a_package_is_refused(platform: Any) -> None:
    register()
    with pytest.raises(PatchError, match=r"vLLM: expected version 0\.32 or newer, below 0\.33, got 0\.99\.0"):
        platform.check_and_update_config(config(surgeon_package="kernels"))


def test_a_config_without_a_model_is_left_alone(platform: Any) -> None:
    register()
    platform.check_and_update_config(
        SimpleNamespace(model_config=None, additional_config={"surgeon_package": "kernels"})
    )
