"""What stands in a topology file or a package: its shape, the density of every head, targets, files and hashes."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from surgeon.compiler.read import parse_topology, read_topology
from surgeon.compiler.schedule import LayerSchedule, schedule_layers, visible_blocks
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import PackageError, TopologyError
from surgeon.runtime.manifest import KernelEntry, Manifest, ModelShape

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = ".:-=+*%@"


@dataclass(frozen=True)
class Pattern:
    """What a topology makes its heads see.

    `density[l][h]` is head h's visible pairs over causal pairs of blocks at the topology's own length; equal layers and
    heads are those with one schedule.
    """

    topology_sha256: str
    model: ModelShape
    block_size: int
    num_blocks: int
    beyond: str
    dendrograms: int
    distinct_layers: int
    distinct_heads: int
    density: tuple[tuple[float, ...], ...]

    @property
    def mean_density(self) -> float:
        """The mean over all heads of all layers."""
        return math.fsum(map(math.fsum, self.density)) / sum(map(len, self.density))


@dataclass(frozen=True)
class TopologyReport:
    """A topology file; `size` is in bytes."""

    path: str
    size: int
    pattern: Pattern


@dataclass(frozen=True)
class PackageReport:
    """A verified package; `id` is the SHA-256 of its manifest, `size` is that of all its files in bytes."""

    path: str
    id: str
    size: int
    pattern: Pattern
    manifest: Manifest


def inspect(path: str | os.PathLike[str]) -> TopologyReport | PackageReport:
    """Reads a topology file, or verifies the package in a folder.

    Raises:
        TopologyError: the file is missing or no topology.
        PackageError: the folder holds no package, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_package(path)
    topology = read_topology(path)
    return TopologyReport(str(path), path.stat().st_size, pattern_of(topology))


def pattern_of(topology: Topology) -> Pattern:
    """Schedules a topology and measures the density of its heads, without expanding any schedule."""
    layers = schedule_layers(topology)
    return Pattern(
        topology_sha256=topology.sha256,
        model=topology.model,
        block_size=topology.block_size,
        num_blocks=topology.num_blocks,
        beyond=topology.beyond,
        dendrograms=len(topology.dendrograms),
        distinct_layers=len({id(layer) for layer in layers}),  # equal schedules are one object
        distinct_heads=len({id(head) for layer in layers for head in layer.heads}),
        density=_densities(layers, topology.num_blocks),
    )


def report_json(report: TopologyReport | PackageReport) -> str:
    """The report as one JSON object; `kind` is "topology" or "package"."""
    pattern = asdict(report.pattern) | {"mean_density": report.pattern.mean_density}
    if isinstance(report, TopologyReport):
        return json.dumps({"kind": "topology", "path": report.path, "bytes": report.size} | pattern)
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
    }
    return json.dumps(package | pattern)


def report_lines(report: TopologyReport | PackageReport, width: int, encoding: str) -> tuple[str, ...]:
    """The report for people, ending in a picture of the densities.

    The picture fits into `width` columns, several heads to a cell where it must, and is drawn in ASCII where `encoding`
    has no bars. Names out of files stand in the lines as they are: the caller makes them safe to print.
    """
    head = _topology_lines(report) if isinstance(report, TopologyReport) else _package_lines(report)
    return (*head, *_pattern_lines(report.pattern), "", *_picture(report.pattern, width, encoding))


def _inspect_package(folder: Path) -> PackageReport:
    from surgeon.runtime.package import read_package

    package = read_package(folder)
    place = f"{folder}/topology.json"
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
    size = (folder / "manifest.json").stat().st_size + sum(file.size for file in package.manifest.files)
    return PackageReport(str(folder), package.id, size, pattern_of(topology), package.manifest)


def _densities(layers: Sequence[LayerSchedule], num_blocks: int) -> tuple[tuple[float, ...], ...]:
    causal = num_blocks * (num_blocks + 1) / 2
    heads = {id(head): head for layer in layers for head in layer.heads}
    density = {key: visible_blocks(head, num_blocks) / causal for key, head in heads.items()}
    return tuple(tuple(density[id(head)] for head in layer.heads) for layer in layers)


def _topology_lines(report: TopologyReport) -> Iterator[str]:
    yield f"topology   {report.path}, {report.size:,} bytes"
    yield f"sha256     {report.pattern.topology_sha256}"


def _package_lines(report: PackageReport) -> Iterator[str]:
    manifest = report.manifest
    yield f"package    {report.path}"
    yield f"id         {report.id}"
    yield f"topology   {manifest.topology_sha256}"
    for target in manifest.targets:
        kernels = [kernel for kernel in manifest.kernels if kernel.target == target]
        yield f"target     {target}: {_counted(len(kernels), 'kernel')}, {', '.join(_dtypes(kernels))}"
    for tool in manifest.tools:
        yield f"tool       {tool.name}: {tool.version}"
    yield f"files      {len(manifest.files)} and the manifest, {report.size:,} bytes"
    for file in manifest.files:
        yield f"{file.size:>13,}  {file.sha256[:12]}  {file.path}"


def _pattern_lines(pattern: Pattern) -> Iterator[str]:
    model = pattern.model
    yield (
        f"model      {model.model_type}: {_counted(model.num_hidden_layers, 'layer')}, "
        f"{_counted(model.num_attention_heads, 'head')}, {_counted(model.num_key_value_heads, 'KV head')}, "
        f"head size {model.head_dim}"
    )
    yield f"weights    {model.weights_sha256 or 'any'}"
    yield (
        f"blocks     {pattern.num_blocks} of {pattern.block_size} tokens ({pattern.num_blocks * pattern.block_size:,} "
        f"tokens), beyond: {pattern.beyond}"
    )
    yield (
        f"schedules  {_counted(pattern.distinct_layers, 'distinct layer')}, "
        f"{_counted(pattern.distinct_heads, 'distinct head')}, from {_counted(pattern.dendrograms, 'dendrogram')}"
    )


def _picture(pattern: Pattern, width: int, encoding: str) -> Iterator[str]:
    bars = _BARS if _has(encoding, _BARS) else _ASCII_BARS
    digits = len(str(len(pattern.density) - 1))
    room = max(1, width - len("layer ") - digits - len("  ") - len("  0.000"))
    heads_a_cell = math.ceil(pattern.model.num_attention_heads / room)
    yield f"density    {pattern.mean_density:.3f} over all heads; a row is a layer, with its mean"
    yield f"           {bars[0]} up to 1/8, {bars[3]} up to 1/2, {bars[-1]} above 7/8 of the causal pairs of blocks"
    if heads_a_cell > 1:
        yield f"           a cell is the mean of {heads_a_cell} heads"
    for layer, heads in enumerate(pattern.density):
        groups = (heads[first : first + heads_a_cell] for first in range(0, len(heads), heads_a_cell))
        cells = "".join(bars[max(0, math.ceil(_mean(group) * len(bars)) - 1)] for group in groups)
        yield f"layer {layer:>{digits}}  {cells}  {_mean(heads):.3f}"


def _dtypes(kernels: Sequence[KernelEntry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(kernel.dtype for kernel in kernels))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _has(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
