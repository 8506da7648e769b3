"""The results of a day on a card, kept in the repository and shown on the pages; those of a rehearsal are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import figures
import readme
from gpu_day import __main__ as command
from gpu_day import figures as pages
from gpu_day import kept
from gpu_day.bars import bars
from gpu_day.day import HOPPER
from gpu_day.speed import operations

Rows = list[dict[str, Any]]


def speed_row(phase: str, length: int, density: float, batch: int = 1, **more: float) -> dict[str, Any]:
    times = {"sdpa_ms": 8.0, "ours_ms": 2.0} | more
    row = {"phase": phase, "length": length, "batch": batch, "density": density, "error": 1e-3, **times}
    row |= {f"times_{name[:-3]}": value / times["ours_ms"] for name, value in times.items() if name != "ours_ms"}
    return row | {"times_sdpa_x_density": row["times_sdpa"] * density}


def a_day(**more: Any) -> dict[str, Any]:
    """The results of a day on a card, as `gpu_day.run` writes them."""
    launch = {"launching": "attention_000", "grid": [1, 1, 1]}
    card = {"card": "NVIDIA H100 80GB", "torch": "2.11", "cuda": "13.0", "triton": "3.6.0", "python": "3.12"}
    stages: dict[str, Rows] = {
        "smoke": [card, launch, {"phase": "prefill", "error": 2e-3, "first_call_s": 0.3}],
        "suite": [{"test": "test_prefill", "passed": 19, "failed": 1, "skipped": 0}],
        "tiles": [{"head_dim": 128, "prefill_error": 3e-3, "prefill_ms": 2.0}, {"head_dim": 128, "fault": "spills"}],
        "speed": [
            speed_row("prefill", 32768, 0.25, flex_ms=3.0) | {"tflops": 470.0},
            speed_row("decode", 32768, 0.25, flex_ms=2.5),
            speed_row("decode", 32768, 0.25, batch=16),
            speed_row("prefill", 8192, 1.0, ours_ms=8.2),
        ],
        "model": [{"what": "first token", "length": 32768, "dense_ms": 40.0, "patched_ms": 20.0}],
    }
    found = {name: {"status": "done", "seconds": 20.0, "rows": rows} for name, rows in stages.items()}
    return {"day": "hopper", "target": "cuda:90", "rehearsal": False, "date": "2026-12-01", "stages": found} | more


def written(folder: Path, day: dict[str, Any]) -> Path:
    (folder / "results.json").write_text(json.dumps(day), encoding="utf-8")
    return folder


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of benchmarks/results."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(kept, "days", lambda: map(kept.read, sorted(folder.glob("gpu-*.json"))))
    return folder


def test_a_day_is_kept_under_its_cards_name_without_the_launches(tmp_path: Path, results: Path) -> None:
    file = kept.keep(written(tmp_path, a_day()), results)
    assert file == results / "gpu-nvidia-h100-80gb.json"
    found = json.loads(file.read_text("utf-8"))
    assert [next(iter(row)) for row in found["stages"]["smoke"]["rows"]] == ["card", "phase"]
    assert found["stages"]["speed"] == a_day()["stages"]["speed"]
    assert (found["date"], found["target"]) == ("2026-12-01", "cuda:90")
    later = kept.keep(written(tmp_path, a_day(date="2026-12-02")), results)
    assert [file.name for file in results.iterdir()] == [later.name]


def failed_smoke(day: dict[str, Any]) -> None:
    day["stages"] = {"smoke": {"status": "failed", "seconds": 3.0, "rows": []}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda day: day.update(rehearsal=True), "expected a day on a card, got a rehearsal"),
        (failed_smoke, "expected a smoke call that is done, got failed"),
        (lambda day: day.update(stages={}), "expected a smoke call that is done, got not run"),
    ],
)
def test_results_of_no_card_are_refused(
    tmp_path: Path, results: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    day = a_day()
    change(day)
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'results.json'}: {message}")):
        kept.keep(written(tmp_path, day), results)
    assert list(results.iterdir()) == []
    written(tmp_path, day).joinpath("results.json").rename(results / "gpu-by-hand.json")
    for page in (pages.where_it_ran, pages.first_rows, pages.all_rows):
        with pytest.raises(SystemExit, match=message):
            page()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"results\.json: expected the results of a day, got no file"):
        command.main(["--out", str(tmp_path), "--keep"])


def test_the_command_keeps_a_day_and_rewrites_the_pages(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "keep", lambda out: kept.keep(out, results))
    page = tmp_path / "page.md"
    part = readme.Part(page, "figures of GPUs", pages.all_rows)
    page.write_text(f"{part.begin}\n{pages.NOTHING}{part.end}\n", encoding="utf-8")
    monkeypatch.setattr(readme.main, "__defaults__", ((part,),))
    assert command.main(["--out", str(written(tmp_path, a_day())), "--keep"]) == 0
    assert "gpu-nvidia-h100-80gb.json" in capsys.readouterr().out
    text = page.read_text("utf-8")
    assert pages.NOTHING not in text
    assert "**NVIDIA H100 80GB**, cuda:90, torch 2.11, cuda 13.0, triton 3.6.0, python 3.12, 2026-12-01.\n" in text


def test_the_pages_show_a_kept_day(tmp_path: Path, results: Path) -> None:
    kept.keep(written(tmp_path, a_day()), results)
    assert "NVIDIA H100 80GB (2026-12-01)" in pages.where_it_ran()
    assert pages.first_rows() in figures.first_figures()
    assert pages.first_rows() == (
        "\n| NVIDIA H100 80GB, bf16, 2026-12-01 | SDPA | FlexAttention | Surgeon |\n|---|---|---|---|\n"
        "| prefill of 32,768, 25% of the blocks | 8 ms | 3 ms | 2 ms |\n"
        "| a token decoded after 32,768, 25% of the blocks | 8 ms | 2.5 ms | 2 ms |\n"
    )
    page = pages.all_rows()
    for row in (
        "| suite | done | 20.0 s | 19 passed, 1 failed, 0 skipped |\n",
        "| tiles | done | 20.0 s | 2 rows, 1 faults |\n",
        "| a token decoded after 32,768, 25% of the blocks | 16 | 8 ms | – | – | 2 ms |\n",
        "| first token | 32,768 | 40.0 ms | 20.0 ms |\n",
        "| all blocks, beside SDPA | >= 0.97 | 0.9756 | yes |\n",
    ):
        assert row in page


def test_a_day_that_was_cut_off_before_its_speed_has_no_rows(tmp_path: Path, results: Path) -> None:
    day = a_day()
    day["stages"] = {name: day["stages"][name] for name in ("smoke", "suite")}
    kept.keep(written(tmp_path, day), results)
    assert pages.first_rows() == ""
    assert "| suite | done |" in pages.all_rows()
    assert "| decoding beside FlexAttention | >= 1.3 | – | no |\n" in pages.all_rows()


def test_without_a_day_the_pages_say_so(results: Path) -> None:
    assert (pages.where_it_ran(), pages.first_rows(), pages.all_rows()) == (pages.NOWHERE, "", pages.NOTHING)


def test_bars_are_judged_by_their_worst_row() -> None:
    stages = a_day()["stages"]
    worst = {bar.what: (bar.found, bar.met) for bar in bars(stages)}
    assert list(worst.values()) == [
        (3e-3, True),
        (1.0, True),
        (470.0, True),
        (1.5, True),
        (1.25, False),
        (pytest.approx(8 / 8.2), True),
        (0.3, True),
    ]
    stages["speed"]["rows"].append(speed_row("prefill", 32768, 0.1, ours_ms=1.9) | {"tflops": 90.0, "error": 6e-3})
    judged = [bar.met for bar in bars(stages)]
    assert judged == [False, False, False, True, False, True, True]


def test_operations_are_two_products_over_the_causal_pairs() -> None:
    length, shape = 8, HOPPER.shape
    pairs = sum(1 for query in range(length) for key in range(length) if key <= query)
    assert operations(HOPPER, length, 0.5) == pairs * shape.heads * shape.head_dim * 2 * 2 / 2
