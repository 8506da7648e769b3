"""The tables of segments that a package carries as constants for its GPU kernels."""

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.compiler.schedule.decode_table import decode_table
from surgeon.compiler.schedule.prefill_table import prefill_table
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segments import SegmentTable


@dataclass(frozen=True)
class TableShape:
    """Which of a schedule's tables a kernel reads: for one query, or for tiles of `rows` and `blocks` blocks."""

    phase: str
    rows: int = 1
    blocks: int = 1

    @property
    def name(self) -> str:
        """What it is called in the package, after the schedule's name."""
        return self.phase if self.phase == "decode" else f"{self.phase}_{self.rows}x{self.blocks}"

    def of(self, layer: LayerSchedule) -> SegmentTable:
        """The table itself."""
        return decode_table(layer) if self.phase == "decode" else prefill_table(layer, self.rows, self.blocks)


def segment_tables(wanted: Mapping[str, tuple[LayerSchedule, TableShape]]) -> dict[str, SegmentTable]:
    """Makes tables, each under the name that is wanted for it."""
    return {name: shape.of(layer) for name, (layer, shape) in wanted.items()}
