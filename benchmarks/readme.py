"""Puts the measured figures into the README pages, each part between its two marks.

Run it after `make bench`, `make peers`, `make pilot`, `benchmarks/learn.py`, `benchmarks/learning_cost.py` and
`benchmarks/demo.py --save benchmarks/results/demo-native.json`. `benchmarks/gpu_day --keep` runs it by itself.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import pilot_figures
from gpu_day.figures import all_rows, where_it_ran
from workers.figures import peers

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"


@dataclass(frozen=True)
class Part:
    """A part of a page that is made from the results, and the marks that it stands between."""

    page: Path
    name: str
    make: Callable[[], str]

    @property
    def begin(self) -> str:
        """The mark before it."""
        return f"<!-- {self.name}: benchmarks/readme.py -->"

    @property
    def end(self) -> str:
        """The mark after it."""
        return f"<!-- end of {self.name} -->"


PARTS = (
    Part(README, "figures", figures.first_figures),
    Part(README, "where it ran", where_it_ran),
    Part(README, "choices", figures.choices),
    Part(README, "learning cost", figures.learning_cost),
    Part(README, "far back", pilot_figures.far_back),
    Part(README, "ways back", pilot_figures.ways_back),
    Part(FOLDER.parent / "runtime/README.md", "ways to run", figures.ways_to_run),
    Part(FOLDER / "README.md", "all figures", figures.all_figures),
    Part(FOLDER / "README.md", "peers", peers),
    Part(FOLDER / "README.md", "figures of GPUs", all_rows),
)


def main(parts: Sequence[Part] = PARTS) -> int:
    """Rewrites the pages and returns the exit status."""
    for part in parts:
        before, _, rest = part.page.read_text(encoding="utf-8").partition(part.begin)
        _, found, after = rest.partition(part.end)
        if not found:
            marks = f"the marks {part.begin} and {part.end}"
            print(f"readme: {part.page}: expected {marks}, got none; put them where it belongs", file=sys.stderr)
            return 2
        part.page.write_text(f"{before}{part.begin}\n{part.make()}{part.end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
