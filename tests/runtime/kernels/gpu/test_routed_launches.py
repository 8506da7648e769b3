"""Layers with routed heads on a stand-in driver: which kernels run, in which order, and what they are given."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import topologies
from gpu_calls import STREAM, TARGETS, arguments, by_any_way, kernels, launches
from gpu_standin import Standin, on_gpu
from surgeon.compiler import compile_package
from surgeon.compiler.package.inspection import PackageReport, inspect
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import load
from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.routing import PARTS, num_slots
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.manifest import KernelEntry, Manifest
from surgeon.runtime.package.reader import PackageFiles, read_package
from topologies import DENSE, window_head

pytest.importorskip("triton")

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 32


def routed_topology() -> Topology:
    """Layer 0 has routed heads, layer 1 has none."""
    layers = [
        [window_head(1, 2, route=3), window_head(1, 2), window_head(0, 1, route=5), DENSE],
        [window_head(1, 2)] * 4,
    ]
    return topologies.build(layers, num_kv_heads=KV_HEADS, head_dim=DIM, block_size=BLOCK, num_blocks=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed") / "kernels"
    return compile_package(routed_topology(), out, list(TARGETS.values()), dtypes=["bf16"])


@pytest.fixture(scope="module")
def files(folder: Path) -> PackageFiles:
    return read_package(folder)


def tensors(q_length: int, k_length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.zeros((2, q_length, HEADS, DIM), dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.zeros((2, 2, KV_HEADS, k_length, DIM), dtype=torch.bfloat16)
    return q, k, v


def entry_of(files: PackageFiles, backend: str, phase: str, layer: int = 0) -> KernelEntry:
    return next(
        kernel
        for kernel in files.manifest.kernels
        if (kernel.target, kernel.phase) == (TARGETS[backend], phase) and layer in kernel.layers
    )


@by_any_way
@pytest.mark.parametrize("q_length", [1, 45])
def test_nodes_and_choice_come_first_and_hand_on_their_memory(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, q_length: int
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    q, k, v = tensors(q_length, 203)
    position, leftpad = torch.tensor([150, 120]), torch.tensor([0, 7])
    gpu.attend(0, Operands(q, k, v, position, leftpad, 0.125, dense_rows=16))
    phases = ["write_nodes", "choose", "attend_chosen"] + (["decode", "combine"] if q_length == 1 else ["prefill"])
    found = launches(standin)
    assert len(found) == len(phases)
    given = {
        phase: arguments(entry_of(files, backend, phase), launch) for phase, launch in zip(phases, found, strict=True)
    }
    nodes, choose, chosen, *read = given.values()
    slots = num_slots(q_length)
    assert slots == (1 if q_length == 1 else 30 + 2)
    assert [launch["stream"] for launch in found] == [STREAM] * len(found)
    geometry = entry_of(files, backend, "write_nodes").launch
    assert geometry is not None
    assert found[0]["grid"] == [KV_HEADS, 2, -(-25 // geometry.tile_rows)]
    assert found[1]["grid"] == [HEADS, 2, -(-slots // 16)]
    assert found[2]["grid"] == [HEADS, 2, slots * (PARTS if q_length == 1 else 1)]
    assert (nodes["nodes"], nodes["num_nodes"], nodes["num_queries"]) == (choose["nodes"], 25, q_length)
    assert (choose["chosen"], choose["num_slots"], choose["most_chosen"]) == (chosen["chosen"], slots, 5)
    assert (choose["dense_tail"], choose["num_table_rows"] > 0) == (16, True)
    for name in ("routes", "key_scale"):
        assert nodes[name] == choose[name]
    for name in ("partial", "partial_lse"):
        assert chosen[name] == read[0][name]
    if q_length == 1:
        splits = found[3]["grid"][2]
        assert (chosen["num_parts"], chosen["first_place"]) == (PARTS, splits)
        assert chosen["num_places"] == read[0]["num_places"] == read[1]["num_splits"] == splits + PARTS
    else:
        assert (chosen["num_parts"], chosen["first_place"], chosen["num_places"]) == (1, 0, q_length)


@by_any_way
@pytest.mark.parametrize("q_length", [1, 45])
def test_layers_without_routed_heads_run_as_ever(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, q_length: int
) -> None:
    gpu = kernels(files, backend, driver)
    standin.log()
    gpu.attend(1, Operands(*tensors(q_length, 203), None, None, 0.125))
    assert len(launches(standin)) == (2 if q_length == 1 else 1)
    assert entry_of(files, backend, "decode", layer=1).symbol == "decode"
    assert entry_of(files, backend, "decode", layer=0).symbol == "routed_decode"


@by_any_way
def test_router_and_routes_are_the_topologys(files: PackageFiles, backend: str, driver: Driver) -> None:
    gpu = kernels(files, backend, driver)
    (layer,) = gpu._routes
    routes, centre, scale = gpu._routes[layer].parts
    router = routed_topology().router
    assert router is not None
    assert router.layers[0] is not None
    assert routes.tolist() == [3, 0, 5, 0]
    torch.testing.assert_close(centre, torch.tensor(router.layers[0].centre), rtol=0, atol=0)
    torch.testing.assert_close(scale, torch.tensor(router.layers[0].scale), rtol=0, atol=0)


@by_any_way
def test_nodes_of_a_longer_cache_are_made_anew_and_the_log_says_so(
    files: PackageFiles, backend: str, driver: Driver, caplog: pytest.LogCaptureFixture, standin: Standin
) -> None:
    gpu = kernels(files, backend, driver)
    with caplog.at_level(logging.DEBUG, logger="surgeon"):
        gpu.attend(0, Operands(*tensors(60, 60), None, None, 0.125))
        gpu.attend(1, Operands(*tensors(1, 203), None, None, 0.125))
        assert not caplog.messages
        gpu.attend(0, Operands(*tensors(1, 203), None, None, 0.125))
    assert caplog.messages == ["layer 0 makes the nodes of 203 keys anew"]
    assert launches(standin)


@pytest.mark.usefixtures("fake_gpu", "standin")
@pytest.mark.parametrize("way", ["cuda"])
def test_calls_through_a_loaded_package(folder: Path) -> None:
    package = load(folder, device="cuda")
    assert package.attention(0, *map(on_gpu, tensors(45, 203))).shape == (2, 45, HEADS, DIM)


def without(phase: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(
        manifest, kernels=tuple(kernel for kernel in manifest.kernels if kernel.phase != phase)
    )


def with_layers(phase: str, *layers: int) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(
        manifest,
        kernels=tuple(
            dataclasses.replace(kernel, layers=layers) if kernel.phase == phase else kernel
            for kernel in manifest.kernels
        ),
    )


REFUSED = {
    "no choice": (without("choose"), r"expected a kernel choose for layer 0, which has routed heads, got none"),
    "no nodes": (
        without("write_nodes"),
        r"expected a kernel write_nodes for layer 0, which has routed heads, got none",
    ),
    "a choice for layers that do not choose": (
        with_layers("choose", 1),
        r"phase: expected one of prefill, decode, combine, .*, got 'choose'",
    ),
    "one kernel for layers of both kinds": (
        with_layers("decode", 0, 1),
        r"layers: expected all with routed heads, or none, got \(0, 1\)",
    ),
    "a kernel that knows no chosen blocks": (
        with_layers("prefill", 0),
        r"kernels\[\d+\]\.arguments\[\d+\]: expected partial pointer",
    ),
}


@by_any_way
@pytest.mark.parametrize("name", REFUSED)
def test_kernels_that_do_not_fit_the_routed_layers(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, name: str
) -> None:
    change, message = REFUSED[name]
    standin.log()
    with pytest.raises(PackageError, match=message):
        kernels(dataclasses.replace(files, manifest=change(files.manifest)), backend, driver)


@by_any_way
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [[0.0] * DIM] * KV_HEADS}, r"layers\[0\]\.scale: expected finite numbers \[2, 64\], above 0, got"),
        ({"scale": [[1.0] * DIM] * 3}, r"layers\[0\]\.scale: expected finite numbers \[2, 64\], above 0, got"),
        ({"centre": [[1e39] * DIM] * KV_HEADS}, r"layers\[0\]\.centre: expected finite numbers \[2, 64\], got"),
        ({"centre": [[1.0] * DIM, [1.0]]}, r"layers\[0\]\.centre: expected finite numbers \[2, 64\], got"),
        ({"centre": None}, r"layers\[0\]\.centre: expected finite numbers \[2, 64\], got None"),
    ],
    ids=["a scale of zero", "heads", "too large", "ragged", "none"],
)
def test_a_router_that_no_topology_has(
    files: PackageFiles, backend: str, driver: Driver, change: dict[str, object], message: str
) -> None:
    root = json.loads(files.files["topology.json"])
    root["router"]["layers"][0] |= change
    damaged = dataclasses.replace(files, files=dict(files.files) | {"topology.json": json.dumps(root).encode()})
    with pytest.raises(PackageError, match=message):
        kernels(damaged, backend, driver)


def test_a_package_whose_router_kernels_leave_a_layer_out_is_not_read(folder: Path, tmp_path: Path) -> None:
    manifest = with_layers("choose", 0, 1)(Manifest.from_json((folder / "manifest.json").read_text()))
    for file in folder.rglob("*"):
        if file.is_file():
            (tmp_path / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.relative_to(folder)).write_bytes(file.read_bytes())
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(PackageError, match=r"choose kernels for cuda:90 bf16: expected each of 1 routed layers once"):
        read_package(tmp_path)


def test_inspect_lists_the_routed_layers_kernels(folder: Path) -> None:
    report = inspect(folder)
    assert isinstance(report, PackageReport)
    phases = {kernel.phase for kernel in report.manifest.kernels}
    assert phases == {"write_nodes", "choose", "attend_chosen", "prefill", "decode", "combine"}
    assert [layer and layer.routed_heads for layer in report.summary.layers] == [2, 0]
