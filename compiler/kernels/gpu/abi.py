"""The binary interface of a compiled kernel, read back from the assembly that Triton made of it.

What the launcher passes is fixed when a package is compiled. A Triton whose parameters differ must fail here: on a
device they would be read as something else.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest

from surgeon.compiler.system.versions import TRITON
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.manifest import Argument

_PTX_PARAMETER = re.compile(r"\.param \.[a-z](?P<bits>\d+)(?P<pointer> \.ptr)?")
_HIP_PARAMETER = re.compile(r"\.size: +(?P<bytes>\d+)\s+\.value_kind: +(?P<kind>global_buffer|by_value)")
_THREADS = re.compile(r"(?:\.reqntid|\.max_flat_workgroup_size:) +(\d+)")
_KINDS = {"pointer": "a pointer", "i64": "8 bytes", "i32": "4 bytes", "fp32": "4 bytes"}


def check_abi(assembly: str, arguments: Sequence[Argument], threads: int, where: str) -> None:
    """Compares a kernel's parameters and its threads per program with what the launcher will pass.

    `assembly` is PTX, or AMD's with its metadata; `arguments` are those of the compiled code, with scratch pointers.

    Raises:
        BuildError: a parameter is missing, is one too many or has another size, or the number of threads differs.
    """
    found = parameters(assembly)
    for index, (argument, kind) in enumerate(zip_longest(arguments, found)):
        expected = _KINDS[argument.type] if argument else "no more"
        if expected != kind:
            name = f" ({argument.name})" if argument else ""
            raise _fault(f"{where}: parameter {index}{name}", expected, kind or "none")
    declared = _THREADS.search(assembly)
    if declared is None or int(declared[1]) != threads:
        raise _fault(f"{where}: threads", str(threads), declared[1] if declared else "none")


def parameters(assembly: str) -> list[str]:
    """The parameters in their order, each "a pointer" or a size in bytes."""
    entry = re.search(r"\.entry \w+\((.*?)\)", assembly, re.DOTALL)
    if entry:
        listed = _PTX_PARAMETER.finditer(entry[1])
        return ["a pointer" if each["pointer"] else f"{int(each['bits']) // 8} bytes" for each in listed]
    return [  # the others, hidden ones, are passed by the driver
        "a pointer" if each["kind"] == "global_buffer" else f"{each['bytes']} bytes"
        for each in _HIP_PARAMETER.finditer(assembly)
    ]


def _fault(where: str, expected: str, got: str) -> BuildError:
    return BuildError(where, expected, got, f"compile with Triton {TRITON}, whose parameters are tested")
