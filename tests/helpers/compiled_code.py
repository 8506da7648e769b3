"""Reads the use of registers and memory out of compiled GPU code."""

import re
import subprocess
from pathlib import Path

from surgeon.compiler.specs.artifacts import Binary
from surgeon.runtime.package.manifest import Argument


def spills(binary: Binary, folder: Path) -> int:
    """The bytes that the compiler spills to memory for lack of registers.

    HIP's scalar registers are first spilled to lanes of vector registers, which are not memory and not counted.
    Source: LLVM, User Guide for AMDGPU Backend, code object metadata.
    """
    if binary.path.endswith(".hsaco"):
        return _number(binary.data, b".private_segment_fixed_size")
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary.data)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", listing.stdout + listing.stderr)
    assert found is not None
    return int(found[1]) + int(found[2])


def operations(binary: Binary, folder: Path) -> list[str]:
    """The opcodes of a cubin, in order."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary.data)
    tool = triton.knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.x]*)", text, re.MULTILINE)


def parameters(binary: Binary, folder: Path) -> list[tuple[int, int]]:
    """The offset and size in bytes of each parameter that a cubin declares, in order."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary.data)
    command = [triton.knobs.nvidia.cuobjdump.path, "-elf", file]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = re.findall(
        r"Ordinal\s*:\s*0x([0-9a-f]+)\s+Offset\s*:\s*0x([0-9a-f]+)\s+Size\s*:\s*0x([0-9a-f]+)", listing
    )
    found = {int(ordinal, 16): (int(offset, 16), int(size, 16)) for ordinal, offset, size in records}
    assert sorted(found) == list(range(len(found)))
    return [found[ordinal] for ordinal in range(len(found))]


def laid_out(arguments: tuple[Argument, ...]) -> list[tuple[int, int]]:
    """The result that `parameters` must give for a kernel with these arguments: naturally aligned, in order."""
    layout, end = [], 0
    for argument in arguments:
        size = {"pointer": 8, "i64": 8, "i32": 4, "fp32": 4}[argument.type]
        offset = -(-end // size) * size
        layout.append((offset, size))
        end = offset + size
    return layout


def _number(data: bytes, name: bytes) -> int:
    """The number that follows a name in the MessagePack notes of a HIP code object."""
    place = data.index(name) + len(name)
    if data[place] < 0x80:
        return data[place]
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4}[data[place]]
    return int.from_bytes(data[place + 1 : place + 1 + width], "big")
