"""The kernels that a target needs: shared between equal layers, refused if the target cannot hold them."""

from collections.abc import Sequence

import pytest

import topologies
from surgeon.compiler.schedule.liveness import liveness_tables
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import MAX_GROUP
from surgeon.compiler.specs.kernel_spec import GpuSpec, KernelSpec
from surgeon.compiler.specs.specialize import HEAD_DIMS, specialize_cpu, specialize_gpu
from surgeon.compiler.specs.tiles import tiles_of
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.target import Target


def specs_of(topology: Topology, target: str = "cpu", dtypes: Sequence[str] | None = None) -> tuple[KernelSpec, ...]:
    layers = schedule_layers(topology)
    if target == "cpu":
        return specialize_cpu(topology, layers, Target("cpu"), dtypes, None, liveness_tables(layers))
    return specialize_gpu(topology, layers, Target.parse(target), dtypes)


def error_of(topology: Topology, target: str, dtypes: Sequence[str] | None = None) -> str:
    with pytest.raises(TargetError) as caught:
        specs_of(topology, target, dtypes)
    return str(caught.value)


def three_layers(**shape: int) -> Topology:
    """Layers 0 and 2 read alike."""
    heads = [topologies.head(0, 0.0, 1, 2), topologies.DENSE]
    tree = {"linkage": topologies.balanced_tree(8)}
    return topologies.build([heads, heads[::-1], heads], [tree], **shape)


def test_a_layer_that_is_not_covered_has_no_kernel() -> None:
    heads = [topologies.DENSE, topologies.DENSE]
    (spec,) = specs_of(topologies.build([[], heads, [], heads]))
    assert spec.layers == (1, 3)


def test_equal_layers_share_a_kernel() -> None:
    topology = three_layers(head_dim=64)
    layers = schedule_layers(topology)
    first, second = specs_of(topology)
    assert (first.name, first.layers, first.schedule) == ("attention_000", (0, 2), layers[0])
    assert (second.name, second.layers, second.schedule) == ("attention_001", (1,), layers[1])
    assert {spec.head_dim for spec in (first, second)} == {64}
    assert {spec.target for spec in (first, second)} == {Target("cpu")}


@pytest.mark.parametrize(
    ("target", "dtypes", "expected"),
    [
        ("cpu", None, ("fp32", "bf16", "fp16")),
        ("cuda:90", None, ("bf16", "fp16")),
        ("hip:gfx942", None, ("bf16", "fp16")),
        ("cpu", ["fp16", "fp32"], ("fp32", "fp16")),
        ("cuda:90", ("bf16",), ("bf16",)),
    ],
)
def test_dtypes_are_the_targets_or_those_asked_for(
    target: str, dtypes: Sequence[str] | None, expected: tuple[str, ...]
) -> None:
    assert {spec.dtypes for spec in specs_of(three_layers(), target, dtypes)} == {expected}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size_of_the_templates_is_taken(head_dim: int) -> None:
    assert specs_of(three_layers(head_dim=head_dim))[0].head_dim == head_dim


@pytest.mark.parametrize(
    ("target", "dtypes", "shape", "text"),
    [
        (
            "cuda:90",
            ["bf16", "fp32"],
            {},
            "dtype fp32: expected one of bf16, fp16 for cuda:90, got 'fp32'; leave it out or change the target",
        ),
        (
            "cpu",
            ["int8"],
            {},
            "dtype int8: expected one of fp32, bf16, fp16 for cpu, got 'int8'; leave it out or change the target",
        ),
        ("cpu", [], {}, "dtypes: expected at least one, got none; leave it out for every dtype of the target"),
        (
            "cpu",
            None,
            {"head_dim": 48},
            "model.head_dim: expected one of 16, 32, 64, 80, 96, 128, 256, got 48; "
            "no kernel template supports this head size",
        ),
        (
            "cuda:90",
            None,
            {"block_size": 48},
            "block_size: expected a power of two for cuda:90, got 48; learn the topology with blocks of 32, 64 or 128",
        ),
    ],
)
def test_what_a_target_cannot_hold(target: str, dtypes: list[str] | None, shape: dict[str, int], text: str) -> None:
    assert error_of(three_layers(**shape), target, dtypes) == text


def test_the_cpu_takes_any_block_size() -> None:
    assert specs_of(three_layers(block_size=48))[0].schedule.block_size == 48


def test_a_gpus_kernels_have_the_tiles_that_cut_their_work() -> None:
    for spec in specs_of(three_layers(head_dim=64, block_size=32), "cuda:90"):
        assert isinstance(spec, GpuSpec)
        tiles = tiles_of(spec.target)
        assert (spec.device, spec.prefill) == (tiles.device, tiles.prefill_tile(64, 32))
        assert spec.decode == tiles.decode_tile(64, 32, spec.shape.heads_per_kv_head)


def test_a_kv_head_with_too_many_query_heads_has_no_tile_for_one_query() -> None:
    for heads, has_one in ((MAX_GROUP, True), (MAX_GROUP + 1, False)):
        (spec,) = specs_of(topologies.window_topology([1] * heads), "cuda:90")
        assert isinstance(spec, GpuSpec)
        assert (spec.decode is not None) == has_one
