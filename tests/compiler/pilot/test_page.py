"""`surgeon report`: one self-contained page with all of a pilot and its topology, safe to open."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from models import SHAPE, sparse_topology
from surgeon.compiler.cli.main import main
from surgeon.compiler.pilot import pilot_charts
from surgeon.compiler.pilot.page import report
from surgeon.compiler.pilot.pilot_charts import curves, density_figures, retrieval_figures
from surgeon.compiler.pilot.svg import Figure
from surgeon.compiler.pilot.table import density_table
from surgeon.compiler.pilot.topology_charts import dendrogram_figures, mask_figures, mask_picture
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import PilotError
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot.figures import FIGURES, AgainstDense
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot, PilotMachine, PilotText, Threshold
from surgeon.runtime.evaluate.retrieval import AskedQuestion
from topologies import build, head, random_topology, tree, window_head

EVIL = '<script>alert("1")</script>&$x$'


class Page(HTMLParser):
    """The page's tags, checked to be closed in order, and its text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text: dict[str, str] = {}
        self.figures: Counter[str] = Counter()
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta"}:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "figure":
            self.figures[self.section] += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data


def topology(name: str = "handbook") -> Topology:
    return dataclasses.replace(sparse_topology(), provenance={"method": "budget", "texts": [{"name": name}]})


def pilot(name: str = "a model", sha256: str = topology().sha256, density: float = 0.375) -> Pilot:
    def column(title: str, sha256: str | None, density: float, beside: AgainstDense | None) -> Column:
        return Column(
            name=title,
            topology_sha256=sha256,
            recall="dense" if sha256 else None,
            dense_rows=128 if sha256 else None,
            density=density,
            losses=(3.0, 3.5),
            perplexity=Estimate(19.75, 1.5),
            continuation_perplexity=Estimate(15.25, 0.5),
            against_dense=beside,
            scores=(1.0, 0.0, 1.0, 0.0),
            first_token=Estimate(0.25, 0.0625),
            decode=Estimate(12.5, 0.5),
            peak_bytes=2_000_000,
            kept_cache_bytes=None,
            weights_sha256="0" * 64,
        )

    figures = dict.fromkeys(FIGURES, Estimate(0.5, 0.125)) | {"continuation_ratio": Estimate(1.0625, 0.03125)}
    beside = AgainstDense(**figures, worst_task="single number")
    columns = (
        column("dense", None, 1.0, None),
        column("patched", sha256, density, beside),
        column("window", "1" * 64, density, beside),
    )
    return Pilot(
        model=name,
        weights_sha256="0" * 64,
        package_id="2" * 64,
        length=64,
        texts=(PilotText(name, "3" * 64, 2),),
        machine=PilotMachine("a processor", "cpu", "fp32", 2, "2", "5", "2026-01-01"),
        questions=tuple(
            AskedQuestion("single number", 64, depth, asked, index)
            for index, (depth, asked) in enumerate((d, a) for d in (0.1, 0.9) for a in ("end", "later"))
        ),
        dropped_tasks=(),
        columns=columns,
        thresholds=(Threshold("perplexity ratio", "at most", 1.05, 1.0625, False),),
        seconds=12.0,
    )


def test_the_page_shows_all_of_it() -> None:
    page = Page(report(pilot(), topology()))
    assert page.figures == {"retrieval": 1, "density": 1, "dendrograms": 2, "masks": 3}
    assert page.tags["svg"] == 7
    assert "figures" not in page.text, "with one density the table has said it all"
    table = " ".join(page.text["table"].split())
    for cell in ("19.750 ± 1.500", "1.0625 ± 0.0312", "12.5 ± 0.5", "50% ± 29%", "37.5%", "unchanged"):
        assert cell in table
    assert "single number, 64 tokens, asked later" in page.text["retrieval"]
    assert "Missed" in page.text["verdict"]
    assert "MISSED: perplexity ratio 1.0625, to be at most 1.05" in page.text["verdict"]
    assert all(f"Layer {layer}" in page.text["masks"] for layer in range(3))
    assert "learned: method" in page.text["provenance"]
    assert "12.5" not in page.text["verdict"]


def test_a_topology_without_trees_has_none_to_show() -> None:
    treeless = build([[window_head(1, 2)] * 4] * 3, **SHAPE)
    page = Page(report(pilot(sha256=treeless.sha256), treeless))
    assert page.figures["dendrograms"] == 0
    assert "None: no head has clusters." in page.text["dendrograms"]
    assert page.figures["masks"] == 3


def several(name: str = "a model") -> list[tuple[str, Pilot]]:
    """Pilots to show beside the first one; the second has no windows."""
    denser = pilot(sha256="4" * 64, density=0.75)
    return [
        ("half.json", pilot(sha256="3" * 64, density=0.5)),
        ("most.json", dataclasses.replace(denser, columns=denser.columns[:2])),
    ]


def test_several_pilots_make_curves_by_density() -> None:
    pilots = (pilot(), *(other for _, other in several()))
    drawn = curves(pilots, lambda column: Estimate(1 + column.density, None), Estimate(1.0, None))
    assert [point.place for point in drawn["patched"]] == [0.375, 0.5, 0.75, 1.0]
    assert [point.figure.value for point in drawn["window"]] == [1.375, 1.5, 1.0]
    rows = density_table(pilots).rows
    assert [(row.name, row.cells[0]) for row in rows] == [
        ("dense", "100.0%"),
        ("patched, recall dense", "75.0%"),
        ("patched, recall dense", "50.0%"),
        ("window, recall dense", "50.0%"),
        ("patched, recall dense", "37.5%"),
        ("window, recall dense", "37.5%"),
    ]
    page = Page(report(pilot(), topology(), several()))
    assert page.figures["figures"] == 11
    assert page.tags["table"] == 3
    assert "75.0%" in page.text["figures"]
    cells = re.findall(r"[\d.]+%", page.text["figures"].split("The models beside those above")[1])
    assert {"75.0%", "50.0%"} <= set(cells)
    assert not {"37.5%", "100.0%"} & set(cells), "the first pilot's models and the dense one stand in the first table"
    assert "75.0%, topology 4444" in page.text["provenance"]


def by_the_pattern() -> tuple[Column, ...]:
    columns = pilot(sha256="3" * 64).columns
    return tuple(dataclasses.replace(column, recall="pattern", dense_rows=0) for column in columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights_sha256": "5" * 64},
            "half.json: weights: expected 0+, unchanged, as in the first pilot, got 5+, CHANGED",
        ),
        ({"length": 128}, "half.json: length: expected 64 tokens.*, got 128 tokens"),
        ({"texts": (PilotText("a model", "6" * 64, 2),)}, "half.json: texts: expected 2 sequences of 3+, .* 6+"),
        (
            {"questions": ()},
            "half.json: tasks: expected 4 of single number in 64 tokens, as in the first pilot, got none",
        ),
        ({"columns": by_the_pattern()}, "half.json: recall: expected dense, 128 dense rows, .* got pattern, 0 dense"),
        (
            {"machine": PilotMachine("another", "cpu", "fp32", 2, "2", "5", "2026-01-02")},
            "half.json: machine: .* got another",
        ),
        (
            {"columns": pilot().columns},
            "half.json: topology: expected another than the other pilots', got [0-9a-f]+ again",
        ),
        ({"columns": pilot(sha256="3" * 64).columns[:1]}, "half.json: columns: expected a patched model, got none"),
    ],
)
def test_pilots_that_differ_in_more_than_their_topology_are_refused(changes: dict[str, Any], message: str) -> None:
    (where, other), *_ = several()
    with pytest.raises(PilotError, match=message):
        report(pilot(), topology(), [(where, dataclasses.replace(other, **changes))])


def axes_of(draw: Callable[[Pilot], object], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of the charts that are drawn, kept and laid out."""
    kept: list[Any] = []

    def keep(title: str, draw: Callable[[Any], None], inches: tuple[float, float]) -> Figure:
        canvas = Canvas(figsize=inches, layout="constrained")
        draw(canvas.add_subplot())
        canvas.draw_without_rendering()
        kept.append(canvas.axes[0])
        return Figure(title, "")

    monkeypatch.setattr(pilot_charts, "figure", keep)
    draw(pilot())
    return kept


@pytest.mark.parametrize("draw", [lambda one: density_figures((one,)), retrieval_figures], ids=["density", "depth"])
def test_charts_name_their_axes_and_their_legends_cross_no_line(
    draw: Callable[[Pilot], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    charts = axes_of(draw, monkeypatch)
    assert charts
    for axes in charts:
        assert axes.get_xlabel().split(":")[0] in {"density", "depth"}
        assert axes.get_ylabel()
        (legend,) = axes.figure.legends
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_it_refers_to_nothing_outside() -> None:
    text = report(pilot(), topology(), several())
    page = Page(text)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "srcset", "data"}:
            assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    wanted = {value[1:] for name, value in page.attributes if name.endswith("href") and value.startswith("#")}
    assert (wanted | set(re.findall(r"url\(#([^)]+)\)", text))) <= set(ids)


def test_every_string_is_escaped() -> None:
    evil = pilot(EVIL)
    columns = (*evil.columns[:2], dataclasses.replace(evil.columns[2], name=EVIL))
    page = Page(report(dataclasses.replace(evil, columns=columns), topology(EVIL), several()))
    assert page.tags["script"] == 0
    for section in ("table", "provenance", "figures"):
        assert EVIL in page.text[section] or json.dumps(EVIL) in page.text[section]


def test_it_is_the_same_for_the_same_input() -> None:
    assert report(pilot(), topology()) == report(pilot(), topology())


def test_masks_of_routed_heads_say_how_many_blocks_they_choose() -> None:
    made = build([[window_head(1, 2, route=3), window_head()]], num_blocks=8)
    (figure,) = mask_figures(made, schedule_layers(made), [[0.5, 0.25]])
    assert "chooses 3" in figure.markup
    assert figure.markup.count("chooses") == 1


def test_masks_are_those_of_the_definition() -> None:
    shape = {"num_layers": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "block_size": 16}
    made = random_topology(np.random.default_rng(1), **shape, num_blocks=24)
    expected = made.block_mask(0, 24)
    for index, schedule in enumerate(schedule_layers(made)[0].heads):
        np.testing.assert_array_equal(mask_picture(schedule, 24), expected[index])
    large = random_topology(np.random.default_rng(1), **shape, num_blocks=300)
    expected = large.block_mask(0, 300)
    for index, schedule in enumerate(schedule_layers(large)[0].heads):
        coarse = mask_picture(schedule, 300, cells=10)
        np.testing.assert_allclose(coarse, expected[index][15::30].reshape(10, 10, 30).mean(axis=2))


def test_trees_with_cuts_come_first_and_the_rest_is_counted() -> None:
    trees = [{"linkage": tree(6, np.random.default_rng(seed), contiguous=False)} for seed in range(20)]
    made = build([[head(17, 1.0), head(0)]], trees, num_blocks=6)
    figures, left_out = dendrogram_figures(made)
    assert figures[0].title == "Dendrogram 17: 1 heads, 1 with a cut above 0"
    assert (len(figures), left_out) == (12, 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pilot.json").write_text(pilot().to_json())
    (tmp_path / "topology.json").write_text(topology().canonical())
    (tmp_path / "other.json").write_text(
        build([[head(window=2)]], [{"linkage": [[0, 1, 1.0, 2]]}], num_blocks=2).canonical()
    )
    out = tmp_path / "report.html"
    arguments = ["report", str(tmp_path / "pilot.json"), str(tmp_path / "topology.json"), "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size:,} bytes\n"
    (tmp_path / "denser.json").write_text(pilot(sha256="3" * 64, density=0.5).to_json())
    (tmp_path / "longer.json").write_text(dataclasses.replace(pilot(sha256="3" * 64), length=128).to_json())
    assert main([*arguments, "--beside", str(tmp_path / "denser.json")]) == 0
    assert "50.0%" in out.read_text()
    capsys.readouterr()
    before = out.read_bytes()
    arguments += ["--beside", str(tmp_path / "denser.json")]
    for place, file, message in (
        (1, "topology.json", "expected 'surgeon.pilot'"),
        (1, "missing.json", "expected a readable file"),
        (2, "other.json", "that the pilot tried"),
        (2, "missing.json", "expected a readable file"),
        (6, "missing.json", "expected a readable file"),
        (6, "longer.json", "longer.json: length: expected 64 tokens, as in the first pilot, got 128 tokens"),
    ):
        wrong = [*arguments[:place], str(tmp_path / file), *arguments[place + 1 :]]
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert out.read_bytes() == before


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    return found


@pytest.mark.slow
def test_a_browser_draws_it_within_the_width_of_a_phone(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    # A script writes the browser's layout into the page, where --dump-dom shows it.
    measure = (
        "<script>document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth,"
        " [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 30).length,"
        " [...document.querySelectorAll('svg image')].length])</script>"
    )
    page.write_text(report(pilot(), topology()).replace("</body>", measure + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=500,900", "--hide-scrollbars"]  # Chromium's windows are at least 500 wide

    def run(*more: str) -> str:
        command = [browser(), *options, *size, *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    found = re.search(r"<title>(.*?)</title>", run("--dump-dom"))
    assert found is not None
    width, content, drawn, images = json.loads(found[1])
    assert content <= width
    assert drawn == 7
    assert images >= 4
    shot = tmp_path / "page.png"
    run(f"--screenshot={shot}")
    data = shot.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (500, 900)
    assert len(data) > 15_000, "a blank page is smaller"
