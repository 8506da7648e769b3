"""The report's figures for pilots: quality and speed against density, and retrieval by depth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING

from surgeon.compiler.pilot.svg import Figure, figure
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot.figures import FIGURES
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = (("#6b7280", "D"), ("#1d4ed8", "o"), ("#d97706", "s"), ("#15803d", "^"))
"""The colour and marker of each column, the dense model first."""
_INCHES = (3.2, 2.4)
Extent = tuple[float, float]
_SHARE: Extent = (-0.05, 1.05)


@dataclass(frozen=True)
class Point:
    """A value at a density or a depth, both of which are shares."""

    place: float
    figure: Estimate


def density_figures(pilots: Sequence[Pilot]) -> tuple[Figure, ...]:
    """Quality and speed of all pilots against density, relative to the dense model, which every pilot also ran."""
    return tuple(
        _against_density(pilots, _title(shown.name), methodcaller("beside_dense", name), Estimate(shown.of_dense, None))
        for name, shown in FIGURES.items()
        if any(column.beside_dense(name) for pilot in pilots for column in pilot.columns)
    )


def retrieval_figures(pilot: Pilot) -> tuple[Figure, ...]:
    """For each task that asks for one fact, and each length, every column's scores by the fact's depth."""
    places = dict.fromkeys((each.task, each.length) for each in pilot.questions if each.depth is not None)
    return tuple(_by_depth(pilot, task, length) for task, length in places)


def curves(
    pilots: Sequence[Pilot], figure_of: Callable[[Column], Estimate | None], dense: Estimate
) -> dict[str, tuple[Point, ...]]:
    """The points of each model but the dense one, by rising density, up to the dense model's own point."""
    found: dict[str, list[Point]] = {}
    for pilot in pilots:
        for column in pilot.columns[1:]:
            estimate = figure_of(column)
            if estimate is not None:
                found.setdefault(column.name, []).append(Point(column.density, estimate))
    last = Point(1.0, dense)
    return {name: (*sorted(points, key=lambda point: point.place), last) for name, points in found.items()}


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _against_density(
    pilots: Sequence[Pilot],
    title: str,
    figure_of: Callable[[Column], Estimate | None],
    dense: Estimate,
    extent: Extent | None = None,
) -> Figure:
    drawn = curves(pilots, figure_of, dense)

    def draw(axes: "Axes") -> None:
        for index, (name, points) in enumerate(drawn.items(), start=1):
            _line(axes, name, index, points)
        _line(axes, "dense", 0, [Point(1.0, dense)])  # drawn on top, where the others end
        axes.set_xlim(0, 1.05)
        axes.set_ylabel(title, fontsize=8)
        _finish(axes, "density: visible pairs of blocks", extent)

    return figure(title, draw, _INCHES)


def _by_depth(pilot: Pilot, task: str, length: int) -> Figure:
    asked = [each for each in pilot.questions if (each.task, each.length) == (task, length)]
    depths = sorted({each.depth for each in asked if each.depth is not None})

    def draw(axes: "Axes") -> None:
        for index, column in enumerate(pilot.columns):
            found = [(depth, pilot.score(column, task, length, depth=depth)) for depth in depths]
            _line(axes, column.name, index, [Point(depth, score) for depth, score in found if score])
        axes.set_ylabel("answers that are right", fontsize=8)
        _finish(axes, "depth: text before the fact", _SHARE)

    return figure(f"{_title(task)}, {length:,} tokens", draw, _INCHES)


def _line(axes: "Axes", name: str, index: int, points: Sequence[Point]) -> None:
    colour, marker = _STYLES[index % len(_STYLES)]
    axes.errorbar(
        [point.place for point in points],
        [point.figure.value for point in points],
        yerr=[point.figure.error or 0.0 for point in points],
        label=name,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1,
        capsize=3,
        zorder=3 if index == 0 else 2,
    )


def _finish(axes: "Axes", across: str, extent: Extent | None) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(extent)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(across)
    # Above the axes, where no line can run through it.
    axes.figure.legend(loc="outside upper left", ncols=3, fontsize=7, frameon=False)
