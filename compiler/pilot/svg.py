"""The report's figures as SVG that can be inlined in one page, byte for byte equal for equal input."""

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from surgeon.runtime.errors import PilotError
from surgeon.runtime.installation import required

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWN: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "image.composite_image": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names are not formulas
}


@dataclass(frozen=True)
class Figure:
    """A figure as SVG, and a description in words. `markup` is safe to use unescaped: all text in it is escaped."""

    title: str
    markup: str


def figure(title: str, draw: Callable[["Axes"], None], inches: tuple[float, float]) -> Figure:
    """Makes the figure that `draw` draws on new axes, with width and height in inches.

    Raises:
        PilotError: matplotlib is not installed.
    """
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
    """Sets Matplotlib to its defaults, whatever the user has set, plus what a page needs."""
    required("matplotlib", PilotError, "surgeon report")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_DRAWN)
        matplotlib.rcParams["svg.hashsalt"] = "surgeon"
        yield


def _inline(svg: str, title: str) -> str:
    """The SVG element alone, as wide as its container, with ids that no other figure on the page has."""
    prefix = hashlib.sha256(f"{title}\n{svg}".encode()).hexdigest()[:8]
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'\b(id=")', rf"\g<1>{prefix}-", element)
    element = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", element)
    size = re.search(r'viewBox="[^"]*"', element)
    assert size is not None
    opening = f'<svg {size[0]} role="img" aria-label="{escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, element, count=1)
