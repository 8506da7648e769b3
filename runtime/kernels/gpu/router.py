"""The router in a package's topology.json: how keys become the nodes that routed heads choose blocks by.

Source: topology.json version 2, in its canonical form.
"""

import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.manifest import Manifest

Channels = npt.NDArray[np.float32]


class PackagedRouter(NamedTuple):
    """A layer's router: a key becomes (key − centre) / scale, both float32 `[KV heads, head_dim]`."""

    centre: Channels
    scale: Channels


def read_router(topology: bytes, manifest: Manifest, where: str) -> dict[int, PackagedRouter]:
    """Reads the router of every routed layer from topology.json, whose hash the manifest has confirmed.

    Raises:
        PackageError: a layer has none, or one of another shape, or with numbers that are not finite; `where` names the
            file.
    """
    if not manifest.routed:
        return {}
    layers = json.loads(topology)["router"]["layers"]
    return {
        layer: PackagedRouter(
            *(
                _channels(layers[layer], name, manifest, f"{where}: router.layers[{layer}]")
                for name in PackagedRouter._fields
            )
        )
        for layer in manifest.routed
    }


def _channels(layer: object, name: str, manifest: Manifest, where: str) -> Channels:
    shape = manifest.model.num_key_value_heads, manifest.model.head_dim
    given = layer.get(name) if isinstance(layer, dict) else None
    try:
        with np.errstate(over="ignore"):  # infinities are refused below
            found = np.array(given, dtype=np.float32)
    except (ValueError, TypeError):
        found = np.empty(0, dtype=np.float32)
    fits = found.shape == shape and bool(np.isfinite(found).all()) and (name != "scale" or bool((found > 0).all()))
    if not fits:
        expected = f"finite numbers {list(shape)}" + (", above 0" if name == "scale" else "")
        raise PackageError(f"{where}.{name}", expected, short_repr(given), "compile the package again")
    return found
