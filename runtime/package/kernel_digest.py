"""The digest that a compiled kernel carries of all that it was made for, so that a loader calls it for nothing else."""

import hashlib
import json
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from surgeon.runtime.package.schedule import HeadSchedule


def kernel_digest(
    topology_sha256: str,
    layers: Sequence[int],
    heads: Sequence[HeadSchedule],
    *,
    dtypes: Collection[str],
    last_readers: npt.NDArray[np.integer],
    num_key_value_heads: int,
    head_dim: int,
    block_size: int,
    num_rows: int,
) -> str:
    """The SHA-256 of a kernel's topology, the layers that it serves, their schedule, its dtypes, and the shape.

    `last_readers` belong to the schedule: caches read them. `num_rows` is the number of rows of blocks that may be
    requested, `UNBOUNDED` unless the topology refuses others.
    """
    distinct = {head: number for number, head in enumerate(dict.fromkeys(heads))}
    made_for = {
        "topology_sha256": topology_sha256,
        "layers": list(layers),
        "heads": [distinct[head] for head in heads],
        "dtypes": sorted(dtypes),
        "last_readers": last_readers.tolist(),
        "schedules": [[head.runs, head.pieces, *([head.route] if head.route else [])] for head in distinct],
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "num_rows": num_rows,
    }
    return hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()


def digest_symbol(symbol: str) -> str:
    """The function of a CPU library that returns the digest of the kernel behind a symbol."""
    return f"{symbol}_digest"
