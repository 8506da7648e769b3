"""Build time: from a topology to a package of compiled kernels.

The names below are imported on first use: reading a topology or a package needs only a small part of the compiler, and
a short command spends most of its time on imports.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.compiler.pipeline import compile_package
    from surgeon.compiler.topology.read import parse_topology, read_topology
    from surgeon.compiler.topology.topology import Topology

__all__ = ["Topology", "compile_package", "parse_topology", "read_topology"]

_HOMES = {
    "Topology": "topology.topology",
    "compile_package": "pipeline",
    "parse_topology": "topology.read",
    "read_topology": "topology.read",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
