"""The report's figures, as SVG that can stand inline in one page, equal byte for byte for equal input."""

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgeon.compiler.dendrogram import Dendrogram
from surgeon.compiler.schedule import HeadSchedule, LayerSchedule
from surgeon.compiler.topology import SparseHead, Topology
from surgeon.runtime.errors import PilotError
from surgeon.runtime.estimates import Estimate
from surgeon.runtime.pilot_results import Column, Pilot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELLS = 64  # a mask's rows and columns in the picture; longer sequences are drawn coarser
_TREES = 12
_LABELS = 24  # more blocks than these have no room for their numbers
_COLOURS = ("#6b7280", "#1d4ed8", "#d97706")
_DRAWN: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "image.composite_image": False,
    "svg.fonttype": "none",  # letters stay letters
    "text.parse_math": False,  # names are not formulas
}


@dataclass(frozen=True)
class Figure:
    """A figure as SVG, and what it shows in words. `markup` is safe as it is: all text in it is escaped."""

    title: str
    markup: str


def pilot_figures(pilot: Pilot) -> tuple[Figure, ...]:
    """Quality and speed of every column, with error bars, under its name and density."""
    figures = [
        _bars(pilot, "Perplexity", lambda column: column.perplexity, from_zero=False),
        _bars(pilot, "KL from dense, nats a token", _beside("divergence")),
        _bars(pilot, "KL from dense, last quarter", _beside("late_divergence")),
        _bars(pilot, "Same first token as dense", _beside("agreement")),
        _bars(pilot, "Time to first token, s", lambda column: column.first_token),
        _bars(pilot, "Decoding, tokens/s", lambda column: column.decode),
    ]
    if pilot.columns[0].passkeys:
        figures.append(_passkeys(pilot))
    return tuple(figures)


def density_map(density: Sequence[Sequence[float]]) -> Figure:
    """Visible pairs over causal pairs of blocks, a row a layer and a column a head; empty where not covered."""
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

    return _figure("Density of every layer and head", draw, (4.2, 1.2 + 0.14 * len(density)))


def dendrogram_figures(topology: Topology) -> tuple[tuple[Figure, ...], int]:
    """The trees, those with most cuts first and each with its heads' cuts as lines, and how many are left out."""
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
    """For each covered layer, which blocks (across) every block (down) sees, a square a head."""
    pictures = {id(head): mask_picture(head, topology.num_blocks) for layer in layers for head in layer.heads}
    figures = []
    for index, layer in enumerate(layers):
        if layer.heads:
            squares = [pictures[id(head)] for head in layer.heads]
            figures.append(_squares(f"Layer {index}", squares, density[index]))
    return tuple(figures)


def mask_picture(head: HeadSchedule, num_blocks: int, cells: int = _CELLS) -> npt.NDArray[np.float64]:
    """The visible share of each cell, `[cells, cells]` or, where there are fewer blocks, `[num_blocks, num_blocks]`.

    A row of cells is that of the blocks' row in its middle, so that time follows the picture and not the sequence.
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


def _beside(name: str) -> Callable[[Column], Estimate | None]:
    return lambda column: None if column.against_dense is None else getattr(column.against_dense, name)


def _bars(pilot: Pilot, title: str, figure: Callable[[Column], Estimate | None], from_zero: bool = True) -> Figure:
    found = [(column, estimate) for column in pilot.columns if (estimate := figure(column)) is not None]
    values = [estimate.value for _, estimate in found]
    errors = [estimate.error or 0.0 for _, estimate in found]
    colours = [_COLOURS[pilot.columns.index(column) % len(_COLOURS)] for column, _ in found]

    def draw(axes: "Axes") -> None:
        places = range(len(found))
        if from_zero:
            axes.bar(places, values, yerr=errors, color=colours, width=0.6, capsize=4)
        else:  # points: their axis may begin where they do
            for place, value, error, colour in zip(places, values, errors, colours, strict=True):
                axes.errorbar([place], [value], yerr=[error], color=colour, fmt="o", capsize=4)
            axes.set_xlim(-0.5, len(found) - 0.5)
        axes.set_xticks(places, [f"{column.name}\n{column.density:.1%}" for column, _ in found])

    return _figure(title, draw, (3.2, 2.4))


def _passkeys(pilot: Pilot) -> Figure:
    lengths = sorted({cell.length for cell in pilot.columns[0].passkeys})

    def draw(axes: "Axes") -> None:
        for index, column in enumerate(pilot.columns):
            for length in lengths:
                cells = [cell for cell in column.passkeys if cell.length == length]
                axes.plot(
                    [cell.depth for cell in cells],
                    [cell.log_probability for cell in cells],
                    color=_COLOURS[index % len(_COLOURS)],
                    linestyle="-" if length == lengths[-1] else ":",
                    marker="o",
                    label=f"{column.name}, {length:,} tokens",
                )
        axes.set(xlabel="depth", ylabel="nats a token")
        axes.legend(fontsize=7)

    return _figure("Log-probability of the hidden number", draw, (4.2, 2.8))


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
            axes.axhline(cut, color=_COLOURS[2], linewidth=0.8, linestyle="--")
        axes.set_xlim(-1, tree.num_blocks)
        axes.set_ylim(0, 1.1 * top)
        axes.set(xlabel="blocks, in the tree's order", ylabel="height")
        if tree.num_blocks <= _LABELS:
            axes.set_xticks(range(tree.num_blocks), [str(block) for block in tree.leaf_order()], fontsize=6)

    title = f"Dendrogram {index}: {len(cuts)} heads, {len(cutting)} with a cut above 0"
    return _figure(title, draw, (4.2, 2.4))


def _squares(title: str, squares: Sequence[npt.NDArray[np.float64]], densities: Sequence[float]) -> Figure:
    """Heads beside each other, as many to a row as a phone can show, in one picture."""
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
        axes.set_axis_off()
        for index, density in enumerate(densities):
            row, column = divmod(index, across)
            axes.text(
                column * step + cells,
                row * step + step - cells,
                f"{index}: {density:.0%}",
                fontsize=7,
                horizontalalignment="right",
                verticalalignment="top",
            )

    return _figure(title, draw, (0.85 * across, 0.85 * down))


def _figure(title: str, draw: Callable[["Axes"], None], inches: tuple[float, float]) -> Figure:
    with _settings():
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=inches, layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        text = io.StringIO()
        canvas.savefig(
            text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True
        )
    return Figure(title, _inline(text.getvalue(), title))


@contextmanager
def _settings() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user has set, and as a page needs it."""
    try:
        import matplotlib
    except ImportError:
        raise PilotError(
            "surgeon report", "matplotlib", "an installation without it", "run pip install 'surgeon[learn]'"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_DRAWN)
        matplotlib.rcParams["svg.hashsalt"] = "surgeon"
        yield


def _inline(svg: str, title: str) -> str:
    """The SVG element alone, as wide as its place, with names that no other figure of the page has."""
    prefix = hashlib.sha256(f"{title}\n{svg}".encode()).hexdigest()[:8]
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'\b(id=")', rf"\g<1>{prefix}-", element)
    element = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", element)
    size = re.search(r'viewBox="[^"]*"', element)
    assert size is not None
    opening = f'<svg {size[0]} role="img" aria-label="{escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, element, count=1)
