"""The package of a server: which of its layers free pages, and how an error that nobody catches is shown."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from models import Compiled, routed_topology, tiny_config
from surgeon.compiler import compile_package
from surgeon.runtime import load
from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.options import Options
from surgeon.runtime.vllm.pages.needs import unread_pages
from surgeon.runtime.vllm.serving import Serving, _show_in_one_line, own_target


def config(pipeline: int = 1, **changes: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=tiny_config(**changes)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline),
    )


def test_a_server_by_the_pattern_frees_pages(compiled: dict[str, Compiled]) -> None:
    serving = Serving(compiled["sparse"].package, Options("kernels", "pattern"))
    groups = [serving.group_of(layer, config()) for layer in range(3)]
    assert [group is not None and layer in group.layers for layer, group in enumerate(groups)] == [True] * 3


@pytest.mark.parametrize(
    ("recall", "changes"),
    [
        ("dense", {}),
        ("pattern", {"pipeline": 2}),
        ("pattern", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_others_keep_them(compiled: dict[str, Compiled], recall: str, changes: dict[str, Any]) -> None:
    assert Serving(compiled["sparse"].package, Options("kernels", recall)).group_of(0, config(**changes)) is None


def test_layers_with_routed_heads_need_all_pages_for_good(tmp_path: Path) -> None:
    package = load(compile_package(routed_topology(), tmp_path / "kernels", targets=["cpu"], dtypes=("fp32",)))
    serving = Serving(package, Options("kernels", "pattern"))
    for layer in range(3):
        group = serving.group_of(layer, config())
        assert group is not None
        unread = unread_pages(group.readers, 1, row=10_000, pages=9_000)
        assert unread == ([] if not {0, 1}.isdisjoint(group.layers) else list(range(1, 9_000)))


@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ({"device_type": "cpu"}, "cpu"),
        (
            {"device_type": "cuda", "is_cuda": lambda: True, "get_device_capability": lambda: Capability(9, 0)},
            "cuda:90",
        ),
        (
            {"device_type": "cuda", "is_cuda": lambda: True, "get_device_capability": lambda: Capability(12, 0)},
            "cuda:120",
        ),
    ],
)
def test_the_target_of_a_servers_device(platform: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_platform(monkeypatch, **platform)
    assert str(own_target()) == target


@pytest.mark.parametrize("names", [("cuda", "rocm"), ("tpu", "tpu")])
def test_other_devices_are_refused(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    device_type, device_name = names
    on_platform(monkeypatch, device_type=device_type, device_name=device_name, is_cuda=lambda: False)
    with pytest.raises(
        PatchError, match=f"vLLM's device: expected a CPU or an NVIDIA GPU: .*, got {device_name}; serve"
    ):
        own_target()


class Capability(NamedTuple):
    major: int
    minor: int


def on_platform(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(**fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The errors that the interpreter would show with a traceback."""
    errors: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda _kind, error, _trace: errors.append(error))
    monkeypatch.delenv("SURGEON_TRACEBACK", raising=False)
    _show_in_one_line()
    return errors


def test_surgeons_errors_are_one_line(shown: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    sys.excepthook(PatchError, PatchError("here", "this", "that\nand", "do so"), None)
    assert shown == []
    assert capsys.readouterr().err == "surgeon: here: expected this, got that\\nand; do so\n"


def test_others_and_those_that_somebody_looks_into_have_their_traceback(
    shown: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, own = ValueError("another"), PatchError("here", "this", "that", "do so")
    sys.excepthook(ValueError, other, None)
    monkeypatch.setenv("SURGEON_TRACEBACK", "1")
    sys.excepthook(PatchError, own, None)
    assert shown == [other, own]
