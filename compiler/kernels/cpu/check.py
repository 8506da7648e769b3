"""Loads a library once, in a process of its own: a linker may fail without saying so."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from surgeon.compiler.specs.kernel_spec import CpuSpec
from surgeon.compiler.system.compilers import Compilers
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.kernel_digest import digest_symbol
from surgeon.runtime.package.manifest import CPU_ABI_VERSION

# Loads the library from memory, since programs may be forbidden in the folder of temporary files, and prints what it
# says of itself. Whatever a dependency of it lacks here is no fault of its own: torch brings what it needs.
_LOAD = """
import ctypes, os, sys
with open(sys.argv[1], "rb") as file:
    data = file.read()
path = sys.argv[1]
if hasattr(os, "memfd_create"):
    descriptor = os.memfd_create("library")
    os.write(descriptor, data)
    path = f"/proc/self/fd/{descriptor}"
try:
    library = ctypes.CDLL(path)
except OSError as error:
    print("lacks a dependency" if "cannot open shared object" in str(error) else error)
    sys.exit()
print(library.surgeon_abi_version())
for symbol in sys.argv[2:]:
    function = getattr(library, symbol)
    function.restype = ctypes.c_char_p
    print(function().decode())
"""


def check_library(compilers: Compilers, library: bytes, compiler: str, specs: Sequence[CpuSpec]) -> None:
    """Refuses a library that this machine cannot load, or that is not the one for these kernels.

    Raises:
        BuildError: the loaded library does not say that it holds them.
    """
    with tempfile.TemporaryDirectory(prefix="surgeon-") as folder:
        (Path(folder) / "library").write_bytes(library)
        command = [sys.executable, "-I", "-c", _LOAD, "library", *(digest_symbol(spec.symbol) for spec in specs)]
        result = compilers.run(command, Path(folder), f"{compiler}: loading the library", {})
    said = result.stdout.splitlines()
    if said not in ([str(CPU_ABI_VERSION), *(spec.digest for spec in specs)], ["lacks a dependency"]):
        wrong = [*said, *result.stderr.splitlines()[-1:], f"status {result.returncode}"]
        raise BuildError(
            f"{compiler}: the linked library",
            f"one that loads and holds {len(specs)} kernels",
            "; ".join(wrong)[:200],
            "see if the compiler and its linker work, or name another one by CXX",
        )
