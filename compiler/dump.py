"""Writes the output of every stage to a folder, for people who want to read what the compiler did."""

from collections.abc import Sequence
from pathlib import Path

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.specs.artifacts import Binary, Source
from surgeon.compiler.specs.kernel_spec import KernelSpec
from surgeon.compiler.system.atomic_files import naming
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule
from surgeon.runtime.package.target import Target

_SHOWN = 64
"""The most runs of a piece that the text lists: with all of them its size would grow with the pieces' square."""


class Dump:
    """The folder given with --dump, with its entries numbered in the order of the stages; None writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def schedules(self, topology: Topology, layers: Sequence[LayerSchedule]) -> None:
        """Writes the canonical topology and the schedule of every layer as text."""
        self._write("1-topology.json", topology.canonical().encode())
        text = "\n".join(f"layer {index}\n{_layer_text(layer)}" for index, layer in enumerate(layers))
        self._write("2-schedule.txt", text.encode())

    def specs(self, target: Target, specs: Sequence[KernelSpec]) -> None:
        """Writes the kernels that a target needs and the layers that they serve."""
        lines = [f"{spec.name}: layers {', '.join(map(str, spec.layers))}; {', '.join(spec.dtypes)}" for spec in specs]
        self._write(f"3-kernels-{target.folder}.txt", ("\n".join(lines) + "\n").encode())

    def sources(self, sources: Sequence[Source]) -> None:
        """Writes the rendered sources."""
        for source in sources:
            for file in source.files:
                self._write(f"4-sources/{file.path}", file.text.encode())

    def binaries(self, binaries: Sequence[Binary]) -> None:
        """Writes the compiled files, and beside each one of a GPU the text that it was assembled from."""
        for binary in binaries:
            path = f"5-binaries/{binary.path}"
            self._write(path, binary.data)
            if binary.assembly:
                self._write(f"{path}.s", binary.assembly.encode())

    def _write(self, name: str, data: bytes) -> None:
        if self._folder is None:
            return
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_bytes(data)


def _layer_text(layer: LayerSchedule) -> str:
    if not layer.heads:
        return "  not covered\n"
    lines = []
    names: dict[HeadSchedule, int] = {}
    for index, head in enumerate(layer.heads):
        if head in names:
            lines.append(f"  head {index}: as head {names[head]}")
            continue
        names[head] = index
        lines.append(f"  head {index}:")
        for piece in head.pieces:
            runs = [f"{run.begin}..{run.end - 1}" for run in head.runs[piece.first_run : piece.end_run][:_SHOWN]]
            if piece.end_run - piece.first_run > _SHOWN:
                runs.append(f"and {piece.end_run - piece.first_run - _SHOWN} more")
            begin = f"row{piece.last_begin:+d}" if piece.follows_row else str(piece.last_begin)
            end = "" if piece.end_row == UNBOUNDED else str(piece.end_row - 1)
            lines.append(f"    rows {piece.first_row}..{end}: blocks {', '.join([*runs, f'{begin}..row'])}")
    return "\n".join(lines) + "\n"
