"""The contents of a topology file or a package: shape, each layer's schedule and density, targets, files, hashes."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from surgeon.compiler.package.contents import packaged_layers, packaged_topology
from surgeon.compiler.schedule.schedule import LayerSchedule, schedule_layers
from surgeon.compiler.topology.pairs import causal_pairs
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.kernels.cpu.dense_rows import DenseRows
from surgeon.runtime.kernels.cpu.rates import VARIANTS, processor_features, processor_level
from surgeon.runtime.package.manifest import KernelEntry, Manifest, ModelShape
from surgeon.runtime.package.reader import read_package


@dataclass(frozen=True)
class LayerSummary:
    """One layer's schedule.

    `kernel` numbers the distinct schedules in the order of their first layers: layers with one number share kernels.
    `pieces` is the total over its distinct heads; `density` is the mean over its heads. `routed_heads` is the number of
    those that choose blocks by content, whose most blocks count as read.
    """

    kernel: int
    distinct_heads: int
    pieces: int
    density: float
    routed_heads: int


@dataclass(frozen=True)
class TopologySummary:
    """The visibility that a topology gives its heads.

    `density[l][h]` is head h's visible pairs over causal pairs of blocks at the topology's own length; layers or heads
    are equal if they have the same schedule. A layer that is not covered has no summary and no densities.
    """

    topology_sha256: str
    model: ModelShape
    block_size: int
    num_blocks: int
    beyond: str
    dendrograms: int
    distinct_layers: int
    distinct_heads: int
    layers: tuple[LayerSummary | None, ...]
    density: tuple[tuple[float, ...], ...]

    @property
    def mean_density(self) -> float:
        """The mean over all heads of all covered layers."""
        return math.fsum(map(math.fsum, self.density)) / sum(map(len, self.density))


@dataclass(frozen=True)
class TopologyReport:
    """A topology file; `size` is in bytes, `sha256` that of the file."""

    path: str
    size: int
    sha256: str
    summary: TopologySummary


@dataclass(frozen=True)
class LayerRun:
    """The prefill kernels of a layer on a GPU target: their number, each for some of the layer's heads.

    With `by_table` the schedule has too many pieces to be code, and the kernels read it from the package's tables.
    """

    target: str
    kernels: int
    by_table: bool


@dataclass(frozen=True)
class PackageReport:
    """A verified package; `id` is the SHA-256 of its manifest, `size` is the total size of its files in bytes.

    `on_cpu` has, for each instruction set of the CPU library, the basis of the runtime's choice: the number of tokens
    from the start that each layer sees whole, and whether torch's dense attention is faster there.
    """

    path: str
    id: str
    size: int
    summary: TopologySummary
    manifest: Manifest
    on_cpu: tuple[DenseRows, ...]

    def runs(self, layer: int) -> tuple[LayerRun, ...]:
        """The prefill kernels of a layer on each of the package's GPU targets."""
        return tuple(
            LayerRun(
                target,
                kernels=sum(kernel.dtype == kernels[0].dtype for kernel in kernels),
                by_table=any(kernel.table for kernel in kernels),
            )
            for target, kernels in sorted(self._prefill.get(layer, {}).items())
        )

    @cached_property
    def _prefill(self) -> Mapping[int, Mapping[str, Sequence[KernelEntry]]]:
        """The prefill kernels by layer and target, found in one pass over what may be a long list."""
        found: dict[int, dict[str, list[KernelEntry]]] = {}
        for kernel in self.manifest.kernels:
            for layer in set(kernel.layers) if kernel.phase == "prefill" else ():
                found.setdefault(layer, {}).setdefault(kernel.target, []).append(kernel)
        return found


def inspect(path: str | os.PathLike[str]) -> TopologyReport | PackageReport:
    """Reads a topology file, or verifies the package in a folder.

    Raises:
        TopologyError: the file is missing or not a topology.
        PackageError: the folder holds no package, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_package(path)
    topology = read_topology(path)
    data = path.read_bytes()
    summary = summary_of(topology, schedule_layers(topology))
    return TopologyReport(str(path), len(data), hashlib.sha256(data).hexdigest(), summary)


def summary_of(topology: Topology, layers: Sequence[LayerSchedule]) -> TopologySummary:
    """Summarizes a topology and its layers' schedules; equal schedules must be one object."""
    causal = causal_pairs(topology.num_blocks)
    # Once a distinct head: counting takes time that grows with the blocks.
    seen = {
        head: topology.visible_pairs(head) / causal for head in {head for heads in topology.layers for head in heads}
    }
    density = tuple(tuple(seen[head] for head in heads) for heads in topology.layers)
    numbers: dict[int, int] = {}
    for layer in layers:
        if layer.heads:
            numbers.setdefault(id(layer), len(numbers))
    return TopologySummary(
        topology_sha256=topology.sha256,
        model=topology.model,
        block_size=topology.block_size,
        num_blocks=topology.num_blocks,
        beyond=topology.beyond,
        dendrograms=len(topology.dendrograms),
        distinct_layers=len(numbers),
        distinct_heads=len({id(head) for layer in layers for head in layer.heads}),
        layers=tuple(
            _summary(layer, numbers[id(layer)], found) if layer.heads else None
            for layer, found in zip(layers, density, strict=True)
        ),
        density=density,
    )


def report_json(report: TopologyReport | PackageReport) -> str:
    """Formats the report as one JSON object; `kind` is "topology" or "package"."""
    summary = asdict(report.summary) | {"mean_density": report.summary.mean_density}
    if isinstance(report, TopologyReport):
        return json.dumps(
            {"kind": "topology", "path": report.path, "bytes": report.size, "sha256": report.sha256} | summary
        )
    manifest = report.manifest
    package = {
        "kind": "package",
        "path": report.path,
        "id": report.id,
        "bytes": report.size,
        "targets": manifest.targets,
        "kernels": [asdict(kernel) for kernel in manifest.kernels],
        "files": [asdict(file) for file in manifest.files],
        "tools": [asdict(tool) for tool in manifest.tools],
        "runs": [
            {
                "on_gpu": [asdict(run) for run in report.runs(layer)],
                "on_cpu": {rows.variant: rows.explain(layer, rows.tokens[layer]) for rows in report.on_cpu},
            }
            if layer in manifest.layers
            else None
            for layer in range(manifest.model.num_hidden_layers)
        ],
    }
    return json.dumps(package | summary)


def _summary(layer: LayerSchedule, number: int, density: Sequence[float]) -> LayerSummary:
    heads = {id(head): head for head in layer.heads}
    return LayerSummary(
        kernel=number,
        distinct_heads=len(heads),
        pieces=sum(len(head.pieces) for head in heads.values()),
        density=math.fsum(density) / len(density),
        routed_heads=sum(head.route > 0 for head in layer.heads),
    )


def _inspect_package(folder: Path) -> PackageReport:
    package = read_package(folder)
    topology = packaged_topology(package)
    # The schedules that its kernels were made from: making them again would take most of the time.
    summary = summary_of(topology, packaged_layers(package, topology.router))
    size = len(package.manifest_bytes) + sum(file.size for file in package.manifest.files)
    schedules = {layer: schedule.heads for layer, schedule in package.schedules.items()}
    level = processor_level(processor_features())
    variants = {PurePosixPath(name).stem for name in package.files if name.startswith("cpu/") and name.endswith(".cpp")}
    on_cpu = tuple(
        DenseRows.of(package.manifest, schedules, variant, level) for variant in VARIANTS if variant in variants
    )
    return PackageReport(str(folder), package.id, size, summary, package.manifest, on_cpu)
