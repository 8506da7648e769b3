"""The figures of the README pages are those of the results, to the letter."""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import pytest

import committed
import figures
import pilot_figures
import readme
import vllm_figures

PART = readme.Part(Path(), "figures", lambda: "| new |\n")


@pytest.mark.parametrize("part", readme.PARTS, ids=lambda part: str(part.name))
def test_a_page_shows_the_results(part: readme.Part) -> None:
    assert f"{part.begin}\n{part.make()}{part.end}" in part.page.read_text(encoding="utf-8")


def test_what_lies_between_the_marks_is_replaced(tmp_path: Path) -> None:
    part = readme.Part(tmp_path / "page.md", PART.name, PART.make)
    part.page.write_text(f"before\n{part.begin}\n| old |\n{part.end}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert readme.main([part]) == 0
        assert part.page.read_text(encoding="utf-8") == f"before\n{part.begin}\n| new |\n{part.end}\nafter\n"


@pytest.mark.parametrize("text", ["no marks", f"{PART.end} before {PART.begin}"])
def test_a_page_without_marks_stays_as_it_is(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = readme.Part(tmp_path / "page.md", PART.name, PART.make)
    part.page.write_text(text, encoding="utf-8")
    assert readme.main([part]) == 2
    assert part.page.read_text(encoding="utf-8") == text
    assert f"page.md: expected the marks {part.begin} and {part.end}, got none" in capsys.readouterr().err


def test_every_result_has_its_command() -> None:
    page = (readme.FOLDER / "README.md").read_text(encoding="utf-8")
    patterns = re.findall(r"`([\w*-]+\.json)`", page)
    for file in committed.RESULTS.iterdir():
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), file.name


def test_servers_are_shown_beside_vllm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(committed.RESULTS / "answers.json", tmp_path)
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    rows = [
        {
            "dtype": "fp32",
            "topology": "smollm2-135m-23-answers-8192",
            "prompt": 8128,
            "requests": 8,
            "first_s": 12.0 / times,
            "first_cpu_s": 20.0 / times,
            "requests_s": 60.0 / times,
            "requests_cpu_s": 100.0 / times,
            "cache_used": 0.4 / times,
        }
        for times in (1, 2, 4)  # vLLM alone, and the two recalls
    ]
    (tmp_path / "serving.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    first, together, cache = vllm_figures.served()
    assert "first token of a prompt of 8,128 tokens, 23% of the blocks, fp32" in first[0]
    assert first[1] == "6.0 s, vLLM alone 12.0 s: 2.00x, of CPU time 2.00x; by the pattern alone 3.0 s"
    assert together[1].startswith("30.0 s, vLLM alone 60.0 s: 2.00x")
    assert cache == ("cache that it has in use after 8,128 tokens by the pattern alone, fp32", "25% of vLLM alone")


def test_far_back_is_the_first_half_of_the_longest_prompts() -> None:
    pilot = json.loads((committed.RESULTS / f"pilot-{figures.QUARTER}.json").read_text(encoding="utf-8"))
    asked = [
        index
        for index, question in enumerate(pilot["questions"])
        if question["task"] == "single number" and question["length"] == pilot["length"] and question["depth"] <= 0.5
    ]
    found = {column["name"]: sum(column["scores"][index] for index in asked) for column in pilot["columns"]}
    shown = pilot_figures.far_back()
    assert f"Of {len(asked)} numbers" in shown
    assert f"found {found['dense']:.0f} when it read all blocks" in shown
    assert f"of the blocks it found {found['patched']:.0f}" in shown
    assert f"by the pattern alone {found['pattern']:.0f}" in shown


def test_the_rules_of_thumb_cover_what_was_measured() -> None:
    text = " ".join(readme.README.read_text(encoding="utf-8").split())
    (prompts,) = map(int, re.findall(r"multiply it by (\d+)\.", text))
    (least, most) = map(int, re.findall(r"in fp32, and (\d+) to (\d+) GB\.", text)[0])
    rows = json.loads((committed.RESULTS / "learning-cost.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert prompts / 1.2 < row["cpu_seconds"] / row["prompt_cpu_seconds"] <= prompts, row["model"]
        beyond_the_weights = row["peak_mb"] / 1e3 - row["parameters"] * 4 / 1e9
        assert least - 0.5 < beyond_the_weights <= most, row["model"]
