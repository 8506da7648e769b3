"""Texts to measure on: the Debian handbook if its package is available, else the story beside this file."""

import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from inputs.cache import cached
from inputs.debian import reason, run, unpack
from surgeon.runtime.errors import ModelError

SHIPPED = Path(__file__).parents[1] / "text" / "lighthouse.txt"
HANDBOOK = "debian-handbook"
_HELD_OUT = f"{HANDBOOK}, last quarter"
_BLOCKS = frozenset({"dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "pre", "td", "th"})
_UNSEEN = frozenset({"head", "script", "style", "div#banner", "ul.docnav"})


@dataclass(frozen=True)
class Text:
    """A text and its name in reports."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def real_text(cache: Path, progress: Callable[[str], None] = lambda _: None) -> Text:
    """The Debian handbook's last quarter, on which nothing is learned, or without apt the shipped story (18 KB)."""
    try:
        folder = cached(cache / "texts" / HANDBOOK, lambda folder: _fetch_handbook(folder, progress))
    except (OSError, subprocess.SubprocessError) as error:
        progress(f"no {HANDBOOK} through apt ({reason(error)}): using {SHIPPED.name}, which this project ships")
        return Text(SHIPPED.name, SHIPPED.read_text(encoding="utf-8"))
    return Text(_HELD_OUT, _parted(folder)[1])


def windows(tokenizer: PreTrainedTokenizerBase, text: Text, length: int, most: int) -> list[torch.Tensor]:
    """Up to `most` windows of the text, `[1, length]` tokens each, disjoint and spread evenly over it.

    Raises:
        ModelError: the text is shorter than one window.
    """
    # The tokenizer warns about texts beyond the model's context, but the model gets only windows.
    tokens = tokenizer(text.text, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ModelError(text.name, f"a text of at least {length} tokens", f"{len(tokens)} tokens", "use a longer text")
    count = min(most, len(tokens) // length)
    step = len(tokens) // count
    return [torch.tensor([tokens[start : start + length]]) for start in range(0, count * step, step)]


def learning_texts(cache: Path, progress: Callable[[str], None] = lambda _: None) -> tuple[Text, ...]:
    """The texts that topologies may be learned on: the handbook's first three quarters, Old Testament, Perl manuals.

    Raises:
        ModelError: one of the packages cannot be downloaded.
    """
    handbook, _ = _parted(_fetched(cache, HANDBOOK, _fetch_handbook, progress))
    perl = _fetched(cache, "perl-doc", _fetch_perl, progress) / "perl.txt"
    old = _fetched(cache, "bible-kjv", _fetch_bible, progress) / "old.txt"
    return (
        Text("debian-handbook, first three quarters", handbook),
        Text("King James Bible, Old Testament", old.read_text(encoding="utf-8")),
        Text("perl-doc", perl.read_text(encoding="utf-8")),
    )


def held_out_texts(cache: Path, progress: Callable[[str], None] = lambda _: None) -> tuple[Text, ...]:
    """The texts on which nothing is learned, validated or chosen: the handbook's last quarter, the New Testament.

    Raises:
        ModelError: one of the packages cannot be downloaded.
    """
    _, handbook = _parted(_fetched(cache, HANDBOOK, _fetch_handbook, progress))
    new = _fetched(cache, "bible-kjv", _fetch_bible, progress) / "new.txt"
    return (
        Text(_HELD_OUT, handbook),
        Text("King James Bible, New Testament", new.read_text(encoding="utf-8")),
    )


def _parted(handbook: Path) -> tuple[str, str]:
    """The first three quarters and the last one, divided at the end of a line."""
    text = (handbook / "handbook.txt").read_text(encoding="utf-8")
    end = text.rfind("\n", 0, len(text) * 3 // 4) + 1
    return text[:end], text[end:]


def _fetched(
    cache: Path,
    name: str,
    fetch: Callable[[Path, Callable[[str], None]], None],
    progress: Callable[[str], None],
) -> Path:
    try:
        return cached(cache / "texts" / name, lambda folder: fetch(folder, progress))
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelError(name, "its package, through apt", reason(error), "run this on a Debian with network") from None


def strip_tags(html: str) -> str:
    """The readable text of a page: no tags, no scripts, no navigation; every block on a line of its own."""
    parser = _Reader()
    parser.feed(html)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n\n"))
    return "\n".join(line for line in lines if line)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._unseen: list[str] = []  # open elements, from the outermost unseen one inwards

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        kind = (named.get("class") or "").partition(" ")[0]
        if self._unseen or {tag, f"{tag}.{kind}", f"{tag}#{named.get('id')}"} & _UNSEEN:
            if tag not in {"meta", "link", "img", "br", "hr", "input"}:
                self._unseen.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag == self._unseen[-1]:
                self._unseen.pop()
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.parts.append(data)


def _fetch_handbook(folder: Path, progress: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        files = unpack([HANDBOOK], Path(scratch), progress)
        pages = sorted((files / "usr/share/doc" / HANDBOOK / "html" / "en-US").glob("*.html"))
        if not pages:
            raise FileNotFoundError("the package holds no en-US pages")
        progress(f"reading {len(pages)} pages")
        text = "\n\n".join(strip_tags(page.read_text(encoding="utf-8")) for page in pages)
        (folder / "handbook.txt").write_text(text + "\n", encoding="utf-8")


def _fetch_bible(folder: Path, progress: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        files = unpack(["bible-kjv", "bible-kjv-text"], Path(scratch), progress)
        for name, verses in (("old", "gen1:1-mal4:6"), ("new", "mat1:1-rev22:21")):
            reader = [str(files / "usr/bin/bible"), "-p", str(files / "usr/lib"), "-f", verses]
            # One verse per line, with its reference before the first space.
            lines = [line.partition(" ")[2] for line in run(reader, folder).splitlines()]
            (folder / f"{name}.txt").write_text("\n".join(filter(None, lines)) + "\n", encoding="utf-8")


def _fetch_perl(folder: Path, progress: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pages = sorted(unpack(["perl-doc"], Path(scratch), progress).rglob("*.pod"))
        manuals = [page for page in pages if "delta" not in page.name]  # those only list a release's changes
        text = "\n\n".join(run(["pod2text", "-u", str(page)], folder) for page in manuals)
        if not text:
            raise FileNotFoundError("the package holds no manual")
        (folder / "perl.txt").write_text(text, encoding="utf-8")
