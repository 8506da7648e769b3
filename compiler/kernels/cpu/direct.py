"""Builds the library of a package's direct op, which runs kernels without Python, where torch's headers are installed.

It speaks torch's C interface of version 2.11, so that one library serves that version and all later ones.
"""

import logging
import os
from importlib.machinery import PathFinder
from pathlib import Path

from surgeon.compiler.kernels.cpu.build import (
    COMPILE_FLAGS,
    DIRECT,
    LINK_FLAGS,
    find_compiler,
    headers_of,
    run_compiler,
)
from surgeon.compiler.specs.artifacts import Binary, CpuSource
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.compilers import Compilers
from surgeon.compiler.system.versions import versions
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.manifest import DIRECT_LIBRARY, Tool

_LOG = logging.getLogger("surgeon")
_HEADER = Path("include/torch/csrc/stable/c/shim.h")
_NAME = "direct.cpp"


def build_direct(source: CpuSource, cache: Cache) -> Binary | None:
    """Compiles the library of the direct op; None where torch's headers are missing or of no use to the compiler.

    A package without it is complete: its calls go through Python. The debug log says why it has none.
    """
    torch = torch_folder()
    if torch is None:
        _LOG.debug("%s is not built: torch's headers are not installed", DIRECT_LIBRARY)
        return None
    compiler, (version, _) = find_compiler(os.environ.get("CXX")), versions("torch")
    text = next(file.text for file in source.files if file.path == DIRECT)
    headers = headers_of(source)
    # Torch comes last: were its headers or libraries searched first, a name there could stand for one of ours.
    flags = (*COMPILE_FLAGS, *LINK_FLAGS)
    key = cache.key((compiler.version, version, *flags, text, *headers, *headers.values()))
    library = cache.get(key)
    if library is None:
        searched = ("-idirafter", str(torch / "include"), f"-L{torch / 'lib'}")
        try:
            with Compilers() as compilers:
                inputs = [_NAME, "-ltorch_cpu"]
                library = run_compiler(compilers, compiler, (*flags, *searched), headers | {_NAME: text}, inputs)
        except BuildError as error:
            _LOG.debug("%s is not built: %s", DIRECT_LIBRARY, error)
            return None
        cache.put(key, library)
    return Binary(DIRECT_LIBRARY, library, (), (Tool("torch", version),))


def torch_folder() -> Path | None:
    """The folder of the installed torch, which is not imported; None if it has not the headers."""
    found = PathFinder.find_spec("torch")
    folders = [] if found is None else found.submodule_search_locations or []
    return next((Path(folder) for folder in folders if (Path(folder) / _HEADER).is_file()), None)
