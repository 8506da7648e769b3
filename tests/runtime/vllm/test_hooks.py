"""The plugin in a vLLM that it does not know: it changes nothing, and refuses a package."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm import register


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
