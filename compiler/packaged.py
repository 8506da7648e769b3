"""A package's tables ─▶ LayerSchedule: the schedules that its kernels were made from, without making them again."""

from collections.abc import Mapping, Sequence

from surgeon.compiler.schedule import UNBOUNDED, HeadSchedule, LayerSchedule, Piece, Run
from surgeon.runtime import schedules
from surgeon.runtime.errors import PackageError
from surgeon.runtime.manifest import Manifest


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
