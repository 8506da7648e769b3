"""Layers that the package covers, but whose attention is not what its kernels compute, are refused at the start."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="run make test-vllm")

from vllm.v1.attention.backend import AttentionType

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.cpu_backend import SurgeonCPUImpl
from surgeon.runtime.vllm.layers import _ranges, check_layer, check_sharing


def layer(**changes: Any) -> Any:
    """Stands for a layer of vLLM's; changes of its attention are named `impl__field`."""
    impl = SurgeonCPUImpl.__new__(SurgeonCPUImpl)
    impl.logits_soft_cap, impl.alibi_slopes, impl.sinks = 0, None, None
    whole = SimpleNamespace(
        impl=impl,
        sliding_window=None,
        kv_sharing_target_layer_name=None,
        attn_type=AttentionType.DECODER,
        head_size=32,
        head_size_v=32,
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(impl if part else whole, field, value)
    return whole


def test_plain_causal_attention_passes() -> None:
    check_layer("layers.0", layer(), 32, SurgeonCPUImpl)
    check_layer("layers.0", layer(attn_type="decoder"), 32, SurgeonCPUImpl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "layers.0: sliding_window: expected None, got 64; serve this model without a package"),
        ({"impl__logits_soft_cap": 30.0}, "layers.0: logits_soft_cap: expected None, got 30.0"),
        ({"impl__alibi_slopes": (0.5,)}, "layers.0: alibi_slopes: expected None, got (0.5,)"),
        ({"impl__sinks": (0.5,)}, "layers.0: sinks: expected None, got (0.5,)"),
        ({"kv_sharing_target_layer_name": "layers.1"}, "kv_sharing_target_layer_name: expected None, got layers.1"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "layers.0: attn_type: expected decoder, got encoder_only"),
        ({"head_size": 64}, "layers.0: head_size: expected 32, got 64"),
        ({"head_size_v": 64}, "layers.0: head_size_v: expected 32, got 64"),
        ({"impl": object()}, "layers.0: backend: expected the plugin's, got object"),
    ],
)
def test_other_attention_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError) as refused:
        check_layer("layers.0", layer(**changes), 32, SurgeonCPUImpl)
    assert message in str(refused.value)


def test_a_cache_of_ours_is_read_by_nobody_else() -> None:
    layers = {"layers.0": layer(), "layers.1": layer(kv_sharing_target_layer_name="layers.0"), "layers.2": layer()}
    check_sharing(layers, {"layers.2"})
    with pytest.raises(PatchError, match=r"layers\.1: kv_sharing_target_layer_name: expected a layer with a cache of"):
        check_sharing(layers, {"layers.0", "layers.2"})


def test_ranges_of_layers() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([]) == ""
