"""What a package was compiled from: its topology, and from its tables the schedules, without making them again."""

from collections.abc import Mapping, Sequence

from surgeon.compiler.schedule.schedule import UNBOUNDED, HeadSchedule, LayerSchedule, Piece, Run
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import PackageError, TopologyError
from surgeon.runtime.package import schedule as schedules
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.reader import PackageFiles


def packaged_topology(package: PackageFiles) -> Topology:
    """The topology that stands in a verified package.

    Raises:
        PackageError: it is none, or not the one that the manifest names.
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


def packaged_layers(
    manifest: Manifest, packaged: Mapping[int, Sequence[schedules.HeadSchedule]]
) -> tuple[LayerSchedule, ...]:
    """The schedule of every layer; equal heads and equal layers are one object, as `schedule_layers` has them.

    Raises:
        PackageError: there is a covered layer without a schedule.
    """
    heads: dict[HeadSchedule, HeadSchedule] = {}
    layers: dict[LayerSchedule, LayerSchedule] = {}
    found = []
    for index in range(manifest.model.num_hidden_layers):
        if index in manifest.layers and index not in packaged:
            raise PackageError(
                "manifest.json: kernels", f"a kernel of layer {index}", "none", "compile the package again"
            )
        layer = LayerSchedule(
            heads=tuple(heads.setdefault(head, head) for head in map(_head, packaged.get(index, ()))),
            num_key_value_heads=manifest.model.num_key_value_heads,
            block_size=manifest.block_size,
            num_rows=manifest.num_blocks if manifest.beyond == "error" else UNBOUNDED,
        )
        found.append(layers.setdefault(layer, layer))
    return tuple(found)


def _head(head: schedules.HeadSchedule) -> HeadSchedule:
    pieces = tuple(Piece._make((*numbers, bool(follows_row))) for *numbers, follows_row in head.pieces)
    return HeadSchedule(tuple(Run(*run) for run in head.runs), pieces)
