"""The variants of prefill kernels: each correct in Triton's interpreter, and compiled for Hopper as it says."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topologies
from compiled_code import operations, spills
from prefill_calls import check, kernel_spec, make_call, render_whole, use_tile
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.specs.artifacts import Binary
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import BuildError
from triton_interpreter import launch, part_of

pytest.importorskip("triton")

VARIANTS = {
    "descriptors": Tile(128, 64, 8, 3, loads="descriptors"),
    "descriptors, 128 keys": Tile(128, 128, 8, 2, loads="descriptors"),
    "two heads": Tile(64, 64, 8, 3, heads=2),
    "two heads, descriptors": Tile(64, 64, 8, 3, loads="descriptors", heads=2),
    "persistent": Tile(128, 32, 8, 3, persistent=True),
    "persistent, descriptors": Tile(128, 64, 8, 3, loads="descriptors", persistent=True),
    "persistent, two heads, descriptors": Tile(64, 64, 8, 3, loads="descriptors", heads=2, persistent=True),
}


@pytest.fixture(params=VARIANTS)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Makes every prefill kernel one of a variant."""
    return use_tile(VARIANTS[request.param], monkeypatch)


def mixed(block_size: int, **shape: Any) -> Topology:
    """Heads of many kinds over 600 tokens or so."""
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_blocks": -(-600 // block_size)} | shape
    rng = np.random.default_rng(block_size)
    return topologies.random_topology(rng, num_layers=1, block_size=block_size, **options)


# In the interpreter


@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_prefill_equals_the_masked_reference(pool: Executor, schedule_as: str, tile: Tile, block_size: int) -> None:
    topology = mixed(block_size)
    call = make_call(topology, length=530)
    assert ("make_tensor_descriptor" in call.text) == (tile.loads == "descriptors")
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)


@pytest.mark.parametrize("block_size", [32, 128])
def test_left_padding_chunks_and_dense_rows(pool: Executor, tile: Tile, block_size: int) -> None:
    topology = mixed(block_size)
    for dense_rows in (0, 40):
        call = make_call(
            topology,
            length=150,
            positions=[0, 77, 250],
            cache_leftpads=[140, 70, 3],
            spare_keys=9,
            dense_rows=dense_rows,
        )
        check(pool, topology, call)


def test_a_padded_head(pool: Executor, tile: Tile) -> None:
    topology = mixed(64, head_dim=80)
    check(pool, topology, make_call(topology, length=300, dtype="float16"))


@pytest.mark.parametrize("block_size", [32, 128])
def test_some_kv_heads_of_a_layer(pool: Executor, schedule_as: str, tile: Tile, block_size: int) -> None:
    topology = mixed(block_size, num_heads=8)
    whole = make_call(topology, length=140, positions=[130])
    out, lse = pool.submit(launch, whole, True).result()
    part, part_lse = pool.submit(launch, part_of(whole, range(1, 2)), True).result()
    np.testing.assert_array_equal(part, out[:, :, 4:])
    np.testing.assert_array_equal(part_lse, lse[:, 4:])


def test_heads_that_do_not_divide_a_kv_heads_have_programs_of_their_own(
    pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(VARIANTS["two heads"], monkeypatch)
    topology = mixed(64, num_heads=6)
    assert kernel_spec(topology).prefill == Tile(128, 64, 8, 3)
    check(pool, topology, make_call(topology, length=200))


# Compiled


@pytest.fixture(scope="module")
def compiled() -> Callable[[Topology], Binary]:
    return lambda topology: build_triton(render_whole(kernel_spec(topology)), "bf16")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [32, 128])
def test_hopper_code_uses_tensor_cores_and_the_copies_of_its_variant_and_does_not_spill(
    compiled: Callable[[Topology], Binary], tile: Tile, block_size: int, head_dim: int, tmp_path: Path
) -> None:
    binary = compiled(mixed(block_size, head_dim=head_dim, num_blocks=12))
    found = {name.split(".")[0] for name in operations(binary, tmp_path)}
    assert "HGMMA" in found
    assert found & {"UTMALDG", "LDGSTS"} == {"UTMALDG" if tile.loads == "descriptors" else "LDGSTS"}
    assert not found & {"STL", "LDL"}
    assert spills(binary, tmp_path) == 0
    geometry = binary.kernels[0].launch
    assert geometry is not None
    # A descriptor for the keys, one for the values.
    assert geometry.scratch_bytes == (2 * 128 if tile.loads == "descriptors" else 0)
    assert (geometry.tile_rows, geometry.program_heads) == (tile.queries, tile.heads)
    assert geometry.persistent == tile.persistent
    assert geometry.shared_bytes <= 232_448


def test_scratch_memory_that_no_descriptor_asks_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(VARIANTS["descriptors"], monkeypatch)
    by_descriptors = render_whole(kernel_spec(mixed(128))).files
    use_tile(Tile(128, 64, 8, 3), monkeypatch)
    source = render_whole(kernel_spec(mixed(128)))
    object.__setattr__(source, "files", by_descriptors)
    with pytest.raises(BuildError, match=r"expected a kernel without scratch memory.*, got 256 bytes aligned to 128"):
        build_triton(source, "bf16")
