"""The binary interface of compiled kernels: written out here, so that a Triton with another one fails by name."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiled_code import laid_out, parameters
from gpu_sources import gpu_sources
from prefill_calls import use_tile
from surgeon.compiler.kernels.gpu import abi
from surgeon.compiler.kernels.gpu.compile import build_triton, check_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import Tile
from surgeon.runtime.errors import BuildError, TargetError
from surgeon.runtime.package.interface import INTERFACES, PAGED_INTERFACES, ROUTED_INTERFACES
from surgeon.runtime.package.manifest import Argument
from surgeon.runtime.package.target import Target
from topologies import build, window_head

pytest.importorskip("triton")

ABI = {
    "attention_000": [8] * 7 + [8] * 9 + [4] * 6 + [8] * 2,
    "attention_by_table": [8] * 7 + [8] * 9 + [4] * 6 + [8] * 3 + [4] + [8] * 2,
    "decode": [8] * 7 + [8] * 9 + [4] * 3 + [8] * 3 + [4] + [8] * 2,
    "combine": [8] * 4 + [4] * 2 + [8] * 2,
}
PAGED_ABI = {
    "paged_attention_000": [8] * 8 + [8] * 5 + [4] * 5 + [8] * 2,
    "paged_attention_by_table": [8] * 8 + [8] * 5 + [4] * 5 + [8] * 3 + [4] + [8] * 2,
    "paged_decode": [8] * 9 + [8] * 5 + [4] * 4 + [8] * 3 + [4] + [8] * 2,
    "paged_combine": [8] * 4 + [4] + [8] * 2,
}
ROUTED_ABI = {
    "write_nodes": [8] * 7 + [8] * 3 + [4] * 3 + [8] * 2,
    "choose": [8] * 7 + [8] * 3 + [4] * 6 + [8] * 3 + [4] + [8] * 2,
    "attend_chosen": [8] * 8 + [8] * 9 + [4] * 6 + [8] * 2,
    "attention_000": [8] * 7 + [8] * 9 + [4] * 6 + [8] * 2 + [8] * 2,
    "routed_attention_by_table": [8] * 7 + [8] * 9 + [4] * 6 + [8] * 3 + [4] + [8] * 2 + [8] * 2,
    "routed_decode": [8] * 7 + [8] * 9 + [4] * 3 + [8] * 3 + [4] * 2 + [8] * 2,
    "combine": ABI["combine"],
}
"""The bytes of each parameter: pointers, strides, numbers, the pointers and the length of a table, scratch pointers."""

TASKS = [8] + [4] * 3
"""Those of persistent programs' tasks, before the scratch pointers."""


def kernels(
    target: str, monkeypatch: pytest.MonkeyPatch, routed: bool = False, persistent: bool = False, paged: bool = False
) -> dict[str, GpuSource]:
    """A kernel of every interface, by its symbol."""
    use_tile(Tile(64, 64, 4, 2, persistent=persistent), monkeypatch)
    heads = [window_head(1, 1, route=3 * routed), window_head(1, 2)]
    topology = build([heads], num_kv_heads=1, head_dim=64, block_size=64, num_blocks=8)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse(target), ["bf16"], paged=paged)
    by_code = gpu_sources(specs)
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0)
    return {Path(source.files[0].path).stem: source for source in (*by_code, *gpu_sources(specs))}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_the_parameters_in_a_cubin(
    routed: bool, persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels("cuda:90", monkeypatch, routed, persistent)
    interfaces = ROUTED_INTERFACES if routed else INTERFACES
    assert {(source.phase, bool(source.table)) for source in found.values()} == set(interfaces)
    for symbol, source in found.items():
        binary = build_triton(source, "bf16")
        declared = parameters(binary, tmp_path)
        expected = (ROUTED_ABI if routed else ABI)[symbol]
        if persistent and source.phase == "prefill":
            expected = expected[:-2] + TASKS + expected[-2:]
        assert [size for _, size in declared] == expected, symbol
        assert declared == laid_out(binary.kernels[0].arguments)


def test_the_parameters_of_kernels_for_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        symbol: source for symbol, source in kernels("cuda:90", monkeypatch, paged=True).items() if "paged" in symbol
    }
    assert {(source.phase, bool(source.table)) for source in found.values()} == set(PAGED_INTERFACES)
    for symbol, source in found.items():
        binary = build_triton(source, "bf16")
        declared = parameters(binary, tmp_path)
        assert [size for _, size in declared] == PAGED_ABI[symbol], symbol
        assert declared == laid_out(binary.kernels[0].arguments)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_a_cubin_has_the_format_that_drivers_load_from_cuda_12_on(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kernels(target, monkeypatch)["combine"]
    assert build_triton(source, "bf16").data[:9] == b"\x7fELF\2\1\1\x33\7"  # CUDA 13's assemblers write \x41 and 8


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_every_kernel_is_compared_with_its_interface(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = {}
    check = abi.check_abi

    def recorded(assembly: str, arguments: Sequence[Argument], threads: int, where: str) -> None:
        check(assembly, arguments, threads, where)
        compared[where] = [8 if kind == "a pointer" else int(kind[0]) for kind in abi.parameters(assembly)]

    monkeypatch.setattr("surgeon.compiler.kernels.gpu.compile.check_abi", recorded)
    for source in kernels(target, monkeypatch).values():
        build_triton(source, "bf16")
    assert compared == {f"{symbol} for {target}": sizes for symbol, sizes in ABI.items()}


PTX = """.visible .entry combine(
	.param .u64 .ptr .global .align 1 combine_param_0,
	.param .u64 .ptr .global .align 1 combine_param_1,
	.param .u64 .ptr .global .align 1 combine_param_2,
	.param .u64 .ptr .global .align 1 combine_param_3,
	.param .u32 combine_param_4,
	.param .u32 combine_param_5,
	.param .u64 .ptr .global .align 1 combine_param_6,
	.param .u64 .ptr .global .align 1 combine_param_7
)
.reqntid 128
{
	.param .b32 param0;
"""
LAST = "\t.param .u64 .ptr .global .align 1 combine_param_7\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PTX.replace(LAST, ""), r"parameter 7 \(profile_scratch\): expected a pointer, got none"),
        (PTX.replace(LAST, LAST + LAST), r"parameter 8: expected no more, got a pointer"),
        (
            PTX.replace(".u32 combine_param_4", ".u64 combine_param_4"),
            r"parameter 4 \(num_splits\): expected 4 bytes, got 8",
        ),
        (
            PTX.replace(".ptr .global .align 1 combine_param_2", "combine_param_2"),
            r"parameter 2 \(out\): expected a pointer, got 8",
        ),
        (PTX.replace("reqntid 128", "reqntid 256"), r"threads: expected 128, got 256"),
        (PTX.replace(".reqntid 128", ""), r"threads: expected 128, got none"),
    ],
)
def test_another_interface_is_named(text: str, message: str) -> None:
    arguments = INTERFACES["combine", False].binary_arguments
    abi.check_abi(PTX, arguments, 128, "combine")
    with pytest.raises(BuildError, match=rf"combine: {message}.*; compile with Triton 3\.6 to 3\.9"):
        abi.check_abi(text, arguments, 128, "combine")


@pytest.mark.parametrize(
    ("version", "works"), [("3.5.1", False), ("3.6.0", True), ("3.9.1+git", True), ("3.10.0", False)]
)
def test_only_tested_versions_of_triton_compile(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    if works:
        check_triton(Target.parse("cuda:90"))
        return
    line = f"expected Triton 3.6 to 3.9, which are tested, got {version}; run pip install 'triton>=3.6,<3.10'"
    with pytest.raises(TargetError, match=re.escape(f"target cuda:90: {line}")):
        check_triton(Target.parse("cuda:90"))
