"""Build time: from a topology to a package of compiled kernels."""

from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.read import parse_topology, read_topology
from surgeon.compiler.topology import Topology

__all__ = ["Topology", "compile_package", "parse_topology", "read_topology"]
