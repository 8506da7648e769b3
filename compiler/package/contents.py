"""The inputs that a package was compiled from: its topology, and the schedules, read back from its tables."""

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.router import Router
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import PackageError, TopologyError
from surgeon.runtime.package.reader import PackageFiles


def packaged_topology(package: PackageFiles) -> Topology:
    """Reads the topology in a verified package.

    Raises:
        PackageError: it is not a topology, or not the one that the manifest names.
    """
    place = f"{package.folder}/topology.json"
    try:
        topology = parse_topology(package.files["topology.json"].decode())
    except (UnicodeDecodeError, TopologyError) as error:
        raise PackageError(place, "a topology", str(error), "compile the package again") from None
    if topology.sha256 != package.manifest.topology_sha256:
        raise PackageError(
            place,
            f"the topology {package.manifest.topology_sha256} that the manifest names",
            topology.sha256,
            "compile the package again",
        )
    return topology


def packaged_layers(package: PackageFiles, router: Router | None) -> tuple[LayerSchedule, ...]:
    """Reads the schedule of every layer; equal heads and equal layers are one object, as in `schedule_layers`.

    `router` is that of the package's topology.

    Raises:
        PackageError: the package's schedules are missing or damaged.
    """
    manifest = package.manifest
    layers: dict[LayerSchedule, LayerSchedule] = {}
    found = []
    for index in range(manifest.model.num_hidden_layers):
        layer = LayerSchedule(
            heads=package.schedules[index].heads if index in package.schedules else (),
            num_key_value_heads=manifest.model.num_key_value_heads,
            block_size=manifest.block_size,
            num_rows=package.num_rows,
            router=None if router is None else router.layers[index],
        )
        found.append(layers.setdefault(layer, layer))
    return tuple(found)
