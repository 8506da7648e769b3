"""The rules of the formats that may change: the checkers take them from here, and from nowhere in the compiler.

Source: DESIGN of topology.json version 1 and of the package; compiler/README.md; topology.schema.json.
"""

import json
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20
MAX_BLOCKS = 16_384
MAX_LAYERS = 512
MAX_HEADS = 512
MAX_TREES = MAX_LAYERS * MAX_HEADS
MAX_DEPTH = 64
MAX_ARITY = 1024
MAX_HEAD_DIM = 1024
MAX_BLOCK_SIZE = 1024
MAX_PROVENANCE_LEVELS = 64
"""The most lists and objects inside one another in a provenance."""

_SCHEMA = Path(__file__).parents[3] / "compiler/topology/topology.schema.json"
TREELESS_HEADS = "window_head" in json.loads(_SCHEMA.read_text("utf-8"))["$defs"]
"""True if a head may have a sink and a window and neither dendrogram nor cut: the schema has a name for such heads."""

PARTS = frozenset(("topology", "schedule", "layers", "tables", "launch"))
"""The parts of a package that can be changed so that all hashes agree.

`layers` says which layers a kernel serves; `launch` are threads, bytes and rows of GPU kernels.
"""

BOUND_BY_DIGEST = frozenset(("topology", "schedule", "layers"))
"""The parts of which compiled kernels carry a digest: a change of meaning there is refused.

The others are covered by the package's identity alone: they may change within their bounds, and are then only counted.
"""
