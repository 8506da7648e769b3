"""The texts to measure on: reading, origin and division into windows."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inputs import texts
from inputs.texts import Text, held_out_texts, learning_texts, real_text, strip_tags, windows
from surgeon.runtime.errors import ModelError

PAGE = """<?xml version="1.0"?><!DOCTYPE html><html><head><title>No</title><link href="x"></head>
<body class="a"><div id="banner"><a href="y"><span>No banner</span></a></div>
<ul class="docnav top"><li><a href="z"><strong>Prev</strong></a></li><li/></ul>
<h1>A &amp; B</h1><div class="para">one
   <code class="command">two</code>, three<br/> four</div><script>var no = "<p>";</script><p>five</p>
<style>no</style></body></html>"""


class Words:
    """A tokenizer that makes a token of each word."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def write_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_tags_are_stripped() -> None:
    assert strip_tags(PAGE).splitlines() == ["A & B", "one two, three four", "five"]


def test_the_handbook_is_unpacked_from_its_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tool(tmp_path / "bin", "apt-get", 'echo "$@" >> "$LOG"; touch debian-handbook.deb')
    pages = "files/usr/share/doc/debian-handbook/html/en-US"
    write_tool(tmp_path / "bin", "dpkg-deb", f"/bin/mkdir -p {pages}; echo '<p>page</p>' > {pages}/index.html")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for _ in range(2):
        assert real_text(tmp_path / "cache") == Text("debian-handbook, last quarter", "page\n")
    assert (tmp_path / "log").read_text().split("\n") == ["download debian-handbook", ""]


def test_without_package_lists_it_takes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tool(
        tmp_path / "bin",
        "apt-get",
        'echo "$@" >> "$LOG"; case "$*" in *update) ;; *) echo "E: no network" >&2; exit 100;; esac',
    )
    write_tool(tmp_path / "bin", "dpkg-deb", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    said: list[str] = []
    assert real_text(tmp_path / "cache", said.append).name == "lighthouse.txt"
    assert "E: no network" in said[-1]
    calls = (tmp_path / "log").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["debian-handbook", "update", "debian-handbook"]
    assert all("Dir::State::Lists=" in call for call in calls[1:])


def test_without_apt_the_shipped_text_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    text = real_text(tmp_path / "cache", said.append)
    assert text == Text("lighthouse.txt", texts.SHIPPED.read_text(encoding="utf-8"))
    assert said == [
        "no debian-handbook through apt (apt-get is not installed): using lighthouse.txt, which this project ships"
    ]
    assert not list((tmp_path / "cache" / "texts").iterdir())


def test_a_broken_package_is_an_error_that_leads_to_the_shipped_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 120)

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    said: list[str] = []
    assert real_text(tmp_path, said.append).name == "lighthouse.txt"
    assert "timed out after 120 seconds" in said[-1]


def test_windows_are_apart_and_spread_over_the_text() -> None:
    text = Text("count", " ".join(map(str, range(100))))
    found = windows(Words(), text, length=10, most=3)  # type: ignore[arg-type]
    assert [window.tolist() for window in found] == [[list(range(i, i + 10))] for i in (0, 33, 66)]
    assert len(windows(Words(), text, length=40, most=9)) == 2  # type: ignore[arg-type]


def test_a_text_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ModelError, match="expected a text of at least 4 tokens, got 3 tokens"):
        windows(Words(), Text("short", "1 2 3"), length=4, most=1)  # type: ignore[arg-type]


def test_what_is_held_out_is_no_part_of_what_is_learned_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = "files/usr/share/doc/debian-handbook/html/en-US"
    paragraphs = "".join(f"<p>paragraph {number}</p>" for number in range(100))
    write_tool(tmp_path / "bin", "apt-get", 'shift; for name in "$@"; do touch "$name.deb"; done')
    write_tool(
        tmp_path / "bin",
        "dpkg-deb",
        f"""case "$2" in
            *debian-handbook*) mkdir -p {pages}; echo '{paragraphs}' > {pages}/index.html;;
            *bible-kjv.deb) mkdir -p files/usr/bin; cp "$(dirname "$0")/reader" files/usr/bin/bible;;
            *perl-doc*) mkdir -p files; touch files/perlop.pod files/perl5000delta.pod;;
        esac""",
    )
    write_tool(tmp_path / "bin", "reader", 'echo "Ge1:1 first of $4"; echo; echo "Ge1:2 second of $4"')
    write_tool(tmp_path / "bin", "pod2text", 'basename "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    handbook, old, perl = (text.text for text in learning_texts(tmp_path / "cache"))
    held, new = (text.text for text in held_out_texts(tmp_path / "cache"))
    lines = handbook.splitlines()
    assert lines + held.splitlines() == [f"paragraph {number}" for number in range(100)]
    assert 70 <= len(lines) <= 75
    assert old == "first of gen1:1-mal4:6\nsecond of gen1:1-mal4:6\n"
    assert new == "first of mat1:1-rev22:21\nsecond of mat1:1-rev22:21\n"
    assert perl == "perlop.pod\n"


def test_texts_that_cannot_be_had_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="debian-handbook: expected its package, through apt, got apt-get is not"):
        learning_texts(tmp_path / "cache")
