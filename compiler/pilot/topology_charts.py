"""The report's figures for a topology: density, dendrograms, and every head's mask."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgeon.compiler.pilot.svg import Figure, figure
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.topology import SparseHead, Topology
from surgeon.runtime.package.schedule import HeadSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELLS = 64  # a mask's rows and columns in the picture; longer sequences are drawn more coarsely
_TREES = 12
_LABELS = 24  # with more blocks than this there is no room for their numbers
_CUT = "#d97706"


def density_map(density: Sequence[Sequence[float]]) -> Figure:
    """Visible pairs over causal pairs of blocks, one row per layer, one column per head; empty if not covered."""
    heads = max(map(len, density))
    table = np.full((len(density), heads), np.nan)
    for layer, row in enumerate(density):
        table[layer, : len(row)] = row

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="none")
        axes.set(xlabel="head", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.colorbar(image, ax=axes, label="density")

    return figure("Density of every layer and head", draw, (4.2, 1.2 + 0.14 * len(density)))


def dendrogram_figures(topology: Topology) -> tuple[tuple[Figure, ...], int]:
    """The trees, those with the most cuts first, each with its heads' cuts as lines, and the number left out."""
    cuts: dict[int, list[float]] = {index: [] for index in range(len(topology.dendrograms))}
    for heads in topology.layers:
        for head in heads:
            if isinstance(head, SparseHead):
                cuts[head.dendrogram].append(head.cut)
    order = sorted(cuts, key=lambda index: (-sum(cut > 0 for cut in cuts[index]), index))[:_TREES]
    figures = tuple(_tree(index, topology.dendrograms[index], cuts[index]) for index in order)
    return figures, len(topology.dendrograms) - len(figures)


def mask_figures(
    topology: Topology, layers: Sequence[LayerSchedule], density: Sequence[Sequence[float]]
) -> tuple[Figure, ...]:
    """The masks of each covered layer: the blocks (across) that every block (down) sees, one square per head.

    The blocks that a routed head chooses depend on the text, so only their number stands there.
    """
    pictures = {id(head): mask_picture(head, topology.num_blocks) for layer in layers for head in layer.heads}
    figures = []
    for index, layer in enumerate(layers):
        if layer.heads:
            squares = [pictures[id(head)] for head in layer.heads]
            routes = [head.route for head in layer.heads]
            figures.append(_squares(f"Layer {index}", squares, density[index], routes))
    return tuple(figures)


def mask_picture(head: HeadSchedule, num_blocks: int, cells: int = _CELLS) -> npt.NDArray[np.float64]:
    """The visible share of each cell, `[cells, cells]` or, if there are fewer blocks, `[num_blocks, num_blocks]`.

    A row of cells shows the row of blocks in its middle, so that time grows with the picture, not with the sequence.
    """
    cells = min(cells, num_blocks)
    edges = np.arange(cells + 1) * num_blocks // cells
    picture = np.zeros((cells, cells))
    for cell in range(cells):
        seen = np.zeros(num_blocks)
        for run in head.row(int(edges[cell] + edges[cell + 1]) // 2):
            seen[run.begin : run.end] = 1
        picture[cell] = np.add.reduceat(seen, edges[:-1]) / np.diff(edges)
    return picture


def _tree(index: int, tree: Dendrogram, cuts: Sequence[float]) -> Figure:
    where = {block: float(place) for place, block in enumerate(tree.leaf_order())}
    heights = dict.fromkeys(where, 0.0)
    lines = []
    for node, (left, right, height, _) in enumerate(tree.linkage, start=tree.num_blocks):
        corners = [(where[left], heights[left]), (where[left], height), (where[right], height)]
        lines.append([*corners, (where[right], heights[right])])
        where[node], heights[node] = (where[left] + where[right]) / 2, height
    cutting = [cut for cut in cuts if cut > 0]

    def draw(axes: "Axes") -> None:
        from matplotlib.collections import LineCollection

        axes.add_collection(LineCollection(lines, colors="#374151", linewidths=0.8))
        top = heights[tree.num_blocks + len(tree.linkage) - 1] or 1.0
        for cut in sorted({min(cut, 1.05 * top) for cut in cutting}):
            axes.axhline(cut, color=_CUT, linewidth=0.8, linestyle="--")
        axes.set_xlim(-1, tree.num_blocks)
        axes.set_ylim(0, 1.1 * top)
        axes.set(xlabel="blocks, in the tree's order", ylabel="height")
        if tree.num_blocks <= _LABELS:
            axes.set_xticks(range(tree.num_blocks), [str(block) for block in tree.leaf_order()], fontsize=6)

    title = f"Dendrogram {index}: {len(cuts)} heads, {len(cutting)} with a cut above 0"
    return figure(title, draw, (4.2, 2.4))


def _squares(
    title: str, squares: Sequence[npt.NDArray[np.float64]], densities: Sequence[float], routes: Sequence[int]
) -> Figure:
    """Draws heads side by side in one picture, as many per row as a phone can show."""
    across = min(len(squares), 5)
    down = -(-len(squares) // across)
    cells = squares[0].shape[0]
    step = cells + max(2, cells // 8)
    sheet = np.full((down * step, across * step), np.nan)
    for index, square in enumerate(squares):
        row, column = divmod(index, across)
        seen = np.where(np.tri(cells, dtype=bool), square, np.nan)
        sheet[row * step + step - cells : (row + 1) * step, column * step : column * step + cells] = seen

    def draw(axes: "Axes") -> None:
        axes.imshow(sheet, vmin=-0.15, vmax=1, cmap="Blues", interpolation="none")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("block that is read", fontsize=7)
        axes.set_ylabel("block that reads", fontsize=7)
        axes.spines[:].set_visible(False)
        for index, (density, route) in enumerate(zip(densities, routes, strict=True)):
            row, column = divmod(index, across)
            axes.text(
                column * step + cells,
                row * step + step - cells,
                f"{index}: {density:.0%}" + (f"\nchooses {route}" if route else ""),
                fontsize=7,
                horizontalalignment="right",
                verticalalignment="top",
            )

    return figure(title, draw, (0.85 * across, 0.85 * down))
