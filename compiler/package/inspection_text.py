"""The findings of `surgeon inspect` as readable lines, with a picture of the densities."""

import math
from collections.abc import Iterator, Sequence

from surgeon.compiler.package.inspection import LayerRun, PackageReport, TopologyReport, TopologySummary
from surgeon.compiler.system.terminal import can_show
from surgeon.runtime.kernels.cpu.dense_rows import DenseRows
from surgeon.runtime.package.interface import PAGED
from surgeon.runtime.package.manifest import DIRECT_LIBRARY, KernelEntry

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = ".:-=+*%@"
_LONGEST = 2**31 - 1  # tokens in a sequence


def report_lines(
    report: TopologyReport | PackageReport, width: int, encoding: str, files: bool = False
) -> tuple[str, ...]:
    """Formats the report for people: the model and its density first, every layer and a picture, the hashes last.

    The picture fits into `width` columns, with several heads per cell if necessary, and is drawn in ASCII if `encoding`
    has no bars. With `files`, a package's tools and files follow. Names from files are in the lines unchanged: the
    caller makes them safe to print.
    """
    head = _topology_lines(report) if isinstance(report, TopologyReport) else _package_lines(report)
    sections = [
        (*head, *_summary_lines(report.summary)),
        _layer_lines(report),
        _picture(report.summary, width, encoding),
    ]
    sections.append(_identity(report))
    if files and isinstance(report, PackageReport):
        sections.append(_file_lines(report))
    first, *others = sections
    return (*first, *(line for section in others for line in ("", *section)))


def _topology_lines(report: TopologyReport) -> Iterator[str]:
    yield f"topology   {report.path}, {report.size:,} bytes"


def _package_lines(report: PackageReport) -> Iterator[str]:
    manifest = report.manifest
    yield f"package    {report.path}, {len(manifest.files)} files and the manifest, {report.size:,} bytes"
    by_target: dict[str, list[KernelEntry]] = {target: [] for target in manifest.targets}
    for kernel in manifest.kernels:
        by_target[kernel.target].append(kernel)
    direct = any(file.path == DIRECT_LIBRARY for file in manifest.files)
    for target, kernels in by_target.items():
        more = "; plain calls go without Python" if target == "cpu" and direct else ""
        if any(kernel.phase.startswith(PAGED) for kernel in kernels):
            more = "; also for keys and values in pages"
        yield f"target     {target}: {_counted(len(kernels), 'kernel')}, {', '.join(_dtypes(kernels))}{more}"


def _summary_lines(summary: TopologySummary) -> Iterator[str]:
    model = summary.model
    yield (
        f"model      {model.model_type}: {_counted(model.num_hidden_layers, 'layer')}, "
        f"{_counted(model.num_attention_heads, 'head')}, {_counted(model.num_key_value_heads, 'KV head')}, "
        f"head size {model.head_dim}"
    )
    yield (
        f"blocks     {summary.num_blocks} of {summary.block_size} tokens ({summary.num_blocks * summary.block_size:,} "
        f"tokens), beyond: {summary.beyond}"
    )
    yield f"density    {summary.mean_density:.1%} of the causal pairs of blocks are read, over all heads"
    if routed := sum(layer.routed_heads for layer in summary.layers if layer is not None):
        yield f"routed     {_counted(routed, 'head')} of all layers, which choose blocks by content"
    yield (
        f"schedules  {_counted(summary.distinct_layers, 'distinct layer')}, "
        f"{_counted(summary.distinct_heads, 'distinct head')}, from {_counted(summary.dendrograms, 'dendrogram')}"
    )


def _identity(report: TopologyReport | PackageReport) -> Iterator[str]:
    if isinstance(report, PackageReport):
        yield f"id         {report.id}, the SHA-256 of manifest.json"
    else:
        yield f"sha256     {report.sha256}, of the file"
    yield f"topology   {report.summary.topology_sha256}, of what it says: not of spaces, key order or provenance"
    yield f"weights    {report.summary.model.weights_sha256 or 'any'}"


def _file_lines(report: PackageReport) -> Iterator[str]:
    for tool in report.manifest.tools:
        yield f"tool       {tool.name}: {tool.version}"
    for file in report.manifest.files:
        yield f"{file.sha256}  {file.path}, {file.size:,} bytes"


def _layer_lines(report: TopologyReport | PackageReport) -> Iterator[str]:
    """One row per layer: its kernel, heads and pieces, its kernels on each GPU; then the basis of choice on a CPU."""
    package = report if isinstance(report, PackageReport) else None
    yield "layers     kernel, which equal layers share; distinct heads; pieces of their schedules"
    for index, layer in enumerate(report.summary.layers):
        if layer is None:
            yield f"{index:>9}  not covered"
            continue
        cells = [
            f"{index:>9}",
            f"attention_{layer.kernel:03d}",
            f"{layer.distinct_heads:>3} {'head' if layer.distinct_heads == 1 else 'heads'}",
            f"{layer.pieces:>5} {'piece' if layer.pieces == 1 else 'pieces'}",
        ]
        if layer.routed_heads:
            cells.append(f"{layer.routed_heads:>3} routed")
        if package is not None:
            cells += map(_on_gpu, package.runs(index))
            cells += [_seen_whole(rows, index) for rows in package.on_cpu[:1]]
        yield "  ".join(cells)
    for rows in package.on_cpu if package is not None else ():
        yield f"on cpu     {rows.variant}: {_runs(rows)}; {rows.reason(_topology_length(rows))}"


def _runs(rows: DenseRows) -> str:
    runs = rows.runs(_topology_length(rows))
    return runs if runs == "kernel" else f"{runs} for a prefill that sees every block, else kernel"


def _topology_length(rows: DenseRows) -> int:
    return rows.manifest.num_blocks * rows.manifest.block_size


def _on_gpu(run: LayerRun) -> str:
    return f"{run.target}: {_counted(run.kernels, 'kernel')}{', by table' if run.by_table else ''}"


def _seen_whole(rows: DenseRows, layer: int) -> str:
    tokens = rows.tokens[layer]
    return "cpu: every block seen" if tokens > _LONGEST else f"cpu: every block seen up to token {tokens}"


def _picture(summary: TopologySummary, width: int, encoding: str) -> Iterator[str]:
    bars = _BARS if can_show(encoding, _BARS) else _ASCII_BARS
    digits = len(str(len(summary.density) - 1))
    room = max(1, width - len("layer ") - digits - len("  ") - len("  0.000"))
    heads_a_cell = math.ceil(summary.model.num_attention_heads / room)
    yield "heads      a row is a layer, with the mean of its heads' densities:"
    yield f"           {bars[0]} up to 1/8, {bars[3]} up to 1/2, {bars[-1]} above 7/8 of the causal pairs of blocks"
    if heads_a_cell > 1:
        yield f"           a cell is the mean of {heads_a_cell} heads"
    for layer, heads in enumerate(summary.density):
        if not heads:
            yield f"layer {layer:>{digits}}  not covered"
            continue
        groups = (heads[first : first + heads_a_cell] for first in range(0, len(heads), heads_a_cell))
        cells = "".join(bars[max(0, math.ceil(_mean(group) * len(bars)) - 1)] for group in groups)
        yield f"layer {layer:>{digits}}  {cells}  {_mean(heads):.3f}"


def _dtypes(kernels: Sequence[KernelEntry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(kernel.dtype for kernel in kernels))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
