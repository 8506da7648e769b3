"""The launches of kernels that are variants: programs of two heads, with scratch memory, or persistent."""

import ctypes
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_calls import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    OCCUPANCY,
    PROCESSORS,
    TARGETS,
    arguments,
    by_any_way,
    changed,
    entry_of,
    kernels,
    launches,
    second_kv_head,
    tensors,
    topology,
    with_launch,
)
from gpu_standin import PROGRAMS_A_PROCESSOR, Standin
from no_waiting import NoWaiting
from surgeon.compiler import compile_package
from surgeon.compiler.specs.tiles import tiles_of
from surgeon.runtime.errors import PatchError, TargetError
from surgeon.runtime.kernels.gpu.driver import Driver
from surgeon.runtime.kernels.gpu.kernel import Kernel
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.interface import INTERFACES
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.target import Target

pytest.importorskip("triton")


@by_any_way
@pytest.mark.parametrize("first_kv_head", [0, 1])
def test_a_program_of_two_heads_halves_the_grid(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, first_kv_head: int
) -> None:
    gpu = kernels(changed(files, backend, with_launch(program_heads=2, phase="prefill")), backend, driver)
    standin.log()
    q, k, v = second_kv_head(150) if first_kv_head else tensors(150, 400)
    gpu.attend(0, Operands(q, k, v, None, None, 1.0), None, first_kv_head)
    (launch,) = launches(standin)
    assert launch["grid"][0] == q.shape[1] // 2


@by_any_way
def test_scratch_memory_is_allocated_for_every_program_of_a_kernel_that_needs_some(
    files: PackageFiles, backend: str, driver: Driver, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = kernels(changed(files, backend, with_launch(scratch_bytes=256)), backend, driver)
    made: list[torch.Tensor] = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: made.append(new_empty(*args, **options)) or made[-1]
    )
    standin.log()
    gpu.attend(0, Operands(*tensors(150, 400), None, None, 1.0))
    (launch,) = launches(standin)
    _, scratch = made  # the first is the output
    assert (scratch.dtype, scratch.numel()) == (torch.uint8, 256 * math.prod(launch["grid"]))
    found = arguments(entry_of(files, backend), launch)
    assert (found["global_scratch"], found["profile_scratch"]) == (scratch.data_ptr(), 0)


def test_a_grid_that_no_driver_takes_is_refused_before_the_driver_sees_it() -> None:
    seen: list[tuple[int, int, int]] = []
    function = SimpleNamespace(launch=lambda grid, _stream, _values: seen.append(grid))
    kernel = Kernel(function, (), ("query_heads", "batch", "row_tiles"), 64, 0, 1, range(4), None)
    lengths = {"query_heads": 100_000, "batch": 65_535, "row_tiles": 65_535}
    kernel.launch(lengths, 0, {}, torch.empty(0))
    for axis in ("batch", "row_tiles"):
        with pytest.raises(PatchError, match=r"at most 65535 programs .*, got 100000, .*65536.* for query_heads"):
            kernel.launch({**lengths, axis: 65_536}, 0, {}, torch.empty(0))
    assert seen == [(100_000, 65_535, 65_535)]


# Persistent programs


@pytest.fixture(scope="module")
def persistent(tmp_path_factory: pytest.TempPathFactory) -> PackageFiles:
    """A package for both vendors' GPUs whose prefill programs are persistent."""
    targets = [Target.parse(name) for name in TARGETS.values()]
    tiles = {}
    for target in targets:
        own = tiles_of(target)
        tile = dataclasses.replace(own.listed("prefill", HEAD_DIM), persistent=True)
        tiles[target] = own.with_tile("prefill", HEAD_DIM, tile)
    out = tmp_path_factory.mktemp("persistent") / "kernels"
    return read_package(compile_package(topology(), out, targets, dtypes=["bf16"], tiles=tiles))


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors of zeros that are made, kept so that what a launch points to is still there."""
    made: list[torch.Tensor] = []
    new_zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda *args, **options: made.append(new_zeros(*args, **options)) or made[-1]
    )
    return made


@pytest.mark.parametrize("q_length", [5, 700])
def test_persistent_programs_are_as_many_as_the_device_holds_and_at_most_one_a_task(
    persistent: PackageFiles,
    way: str,
    backend: str,
    driver: Driver,
    standin: Standin,
    counters: list[torch.Tensor],
    q_length: int,
) -> None:
    gpu = kernels(persistent, backend, driver)
    entry = entry_of(persistent, backend)
    assert entry.launch is not None
    assert entry.launch.grid == ("programs", "one", "one")
    (asked,) = (call for call in standin.log() if call["call"] == OCCUPANCY[backend])
    assert (asked["threads"], asked["shared"]) == (entry.launch.threads, entry.launch.shared_bytes)
    assert asked["place"] == {"cuda": 100, "hip": 0}[backend]

    gpu.attend(1, Operands(*tensors(q_length, 800), None, None, 1.0))
    (launch,) = launches(standin)
    found = arguments(entry, launch)
    tasks = HEADS * 2 * (-(-q_length // entry.launch.tile_rows) + 1)
    assert launch["grid"] == [min(tasks, PROCESSORS * PROGRAMS_A_PROCESSOR), 1, 1]
    assert (tasks < PROCESSORS * PROGRAMS_A_PROCESSOR) == (q_length == 5)
    assert [found[name] for name in ("num_task_heads", "num_sequences", "num_tasks")] == [HEADS, 2, tasks]
    assert ctypes.c_int32.from_address(int(found["tasks_taken"])).value == 0
    (counter,) = counters
    assert (counter.data_ptr(), counter.dtype, counter.numel()) == (found["tasks_taken"], torch.int32, 1)


@by_any_way
def test_persistent_programs_of_a_part_and_of_two_heads_have_fewer_tasks(
    persistent: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    of_two = changed(persistent, backend, with_launch(program_heads=2, scratch_bytes=256, phase="prefill"))
    gpu = kernels(of_two, backend, driver)
    made: list[int] = []
    standin.log()
    with pytest.MonkeyPatch.context() as patch:
        new_empty = torch.Tensor.new_empty
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda tensor, size, **options: made.append(math.prod(size)) or new_empty(tensor, size, **options),
        )
        gpu.attend(0, Operands(*second_kv_head(150), None, None, 1.0), None, 1)
    (launch,) = launches(standin)
    found = arguments(entry_of(of_two, backend), launch)
    assert (found["num_task_heads"], found["num_tasks"]) == (HEADS // KV_HEADS // 2, 2 * 3)
    assert launch["grid"] == [2 * 3, 1, 1]
    assert made[-1] == 256 * 2 * 3  # for each program, not for each task


@by_any_way
def test_persistent_programs_that_read_a_table(
    backend: str, driver: Driver, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0)
    target = Target.parse(TARGETS[backend])
    tile = dataclasses.replace(tiles_of(target).listed("prefill", HEAD_DIM), persistent=True)
    tiles = {target: tiles_of(target).with_tile("prefill", HEAD_DIM, tile)}
    by_table = read_package(compile_package(topology(), tmp_path / "kernels", [target], ["bf16"], tiles=tiles))
    gpu = kernels(by_table, backend, driver)
    standin.log()
    gpu.attend(0, Operands(*tensors(150, 400), None, None, 1.0))
    (launch,) = launches(standin)
    entry = entry_of(by_table, backend)
    assert entry.arguments == INTERFACES["prefill", True].persistent.binary_arguments
    found = arguments(entry, launch)
    assert found["num_table_rows"] > 0
    assert found["num_tasks"] == HEADS * 2 * 3


@by_any_way
def test_a_launch_of_persistent_programs_never_waits_for_the_device(
    persistent: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    gpu = kernels(persistent, backend, driver)
    position, cache_leftpad = torch.tensor([200, 250]), torch.tensor([0, 7])
    standin.log()
    with NoWaiting():
        gpu.attend(1, Operands(*tensors(5, 300), position, cache_leftpad, 1.0))
    assert launches(standin)


def test_a_driver_that_does_not_say_how_many_programs_run(
    persistent: PackageFiles, files: PackageFiles, backend: str, driver: Driver, standin: Standin
) -> None:
    standin.fail(OCCUPANCY[backend], 1)
    with pytest.raises(TargetError, match=r"occupancy of attention_000: expected the number .*, got .*INVALID_VALUE"):
        kernels(persistent, backend, driver)
    kernels(files, backend, driver)  # nothing is asked for other kernels
    standin.fail(OCCUPANCY[backend], 0)
