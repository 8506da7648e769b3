"""The facts that a package's topology.json states: those of its manifest, which must agree, and the router.

Source: topology.json in its canonical form, followed by a line break, as the compiler writes it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.manifest import Manifest

FILE = "topology.json"
_AGAIN = "compile the package again"

Channels = npt.NDArray[np.float32]


class PackagedRouter(NamedTuple):
    """A layer's router: a key becomes (key − centre) / scale, both float32 `[KV heads, head_dim]`."""

    centre: Channels
    scale: Channels


def check_topology(data: bytes, manifest: Manifest, folder: str) -> None:
    """Compares a package's topology.json with what the manifest says of it, without reading the trees.

    Raises:
        PackageError: the file has another hash, is not a topology, or disagrees on the model's shape, the blocks, the
            covered layers, or layers that share a schedule.
    """
    found = hashlib.sha256(data.removesuffix(b"\n")).hexdigest()
    if found != manifest.topology_sha256:
        raise PackageError(f"{folder}/{FILE}", f"SHA-256 {short_repr(manifest.topology_sha256, 70)}", found, _AGAIN)
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{folder}/{FILE}", "JSON", short_repr(str(error)), _AGAIN) from None
    layers = root.get("layers") if isinstance(root, dict) else None
    if not isinstance(root, dict) or not isinstance(layers, list):
        raise PackageError(f"{folder}/{FILE}", "a topology with layers", short_repr(root), _AGAIN)
    model = root.get("model")
    router = root.get("router")
    found_routers = router.get("layers") if isinstance(router, dict) else None
    routers: list[object] = found_routers if isinstance(found_routers, list) else []
    stated: Mapping[str, object] = {f"model.{name}": value for name, value in asdict(manifest.model).items()} | {
        "block_size": manifest.block_size,
        "num_blocks": manifest.num_blocks,
        "beyond": manifest.beyond,
        "num_hidden_layers": manifest.model.num_hidden_layers,
        "layers": list(manifest.layers),
        "routed": list(manifest.routed),
    }
    meant: Mapping[str, object] = {
        **{f"model.{name}": value for name, value in (model if isinstance(model, dict) else {}).items()},
        **{name: root.get(name) for name in ("block_size", "num_blocks", "beyond")},
        "num_hidden_layers": len(layers),
        "layers": [index for index, layer in enumerate(layers) if layer],
        "routed": [index for index, layer in enumerate(routers) if layer is not None],
    }
    for name, value in stated.items():
        if value != meant.get(name):
            raise PackageError(
                f"{folder}/manifest.json: {name}",
                f"{short_repr(meant.get(name))}, as {FILE} has it",
                short_repr(value),
                "do not use this package",
            )
    routers += [None] * (len(layers) - len(routers))
    # Once: many kernels may name a layer.
    spelled = [json.dumps(pair, sort_keys=True) for pair in zip(layers, routers[: len(layers)], strict=True)]
    schedules: dict[str, str] = {}
    for kernel in manifest.kernels:
        for layer in kernel.layers if kernel.schedule else ():
            heads = spelled[layer]
            if schedules.setdefault(heads, kernel.schedule) != kernel.schedule:
                raise PackageError(
                    f"{folder}/manifest.json: kernels",
                    f"{schedules[heads]} for layer {layer}, as for a layer with the same heads in {FILE}",
                    short_repr(kernel.schedule),
                    "do not use this package",
                )


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
        raise PackageError(f"{where}.{name}", expected, short_repr(given), _AGAIN)
    return found
