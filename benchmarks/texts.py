"""Text to measure on: the Debian handbook where its package can be had, else the story that stands beside this file."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cache import cached
from surgeon.runtime.errors import ModelError

SHIPPED = Path(__file__).parent / "text" / "lighthouse.txt"
HANDBOOK = "debian-handbook"
_BLOCKS = frozenset({"dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "pre", "td", "th"})
_UNSEEN = frozenset({"head", "script", "style", "div#banner", "ul.docnav"})
_SECONDS = 120


@dataclass(frozen=True)
class Text:
    """A text and what to call it in a report."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def real_text(cache: Path, progress: Callable[[str], None] = lambda _: None) -> Text:
    """The English Debian handbook (1.1 MB), from the cache or through apt; without apt the shipped story (18 KB)."""
    try:
        folder = cached(cache / "texts" / HANDBOOK, lambda folder: _fetch_handbook(folder, progress))
    except (OSError, subprocess.SubprocessError) as error:
        progress(f"no {HANDBOOK} through apt ({_reason(error)}): using {SHIPPED.name}, which this project ships")
        return Text(SHIPPED.name, SHIPPED.read_text(encoding="utf-8"))
    return Text(HANDBOOK, (folder / "handbook.txt").read_text(encoding="utf-8"))


def windows(tokenizer: PreTrainedTokenizerBase, text: Text, length: int, most: int) -> list[torch.Tensor]:
    """Up to `most` windows of the text, `[1, length]` tokens each, apart from each other and spread evenly over it.

    Raises:
        ModelError: the text is shorter than one window.
    """
    # The tokenizer warns of texts beyond the model's context; the windows are what the model gets.
    tokens = tokenizer(text.text, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ModelError(text.name, f"a text of at least {length} tokens", f"{len(tokens)} tokens", "use a longer text")
    count = min(most, len(tokens) // length)
    step = len(tokens) // count
    return [torch.tensor([tokens[start : start + length]]) for start in range(0, count * step, step)]


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
        self._unseen: list[str] = []  # open elements from the first unseen one inwards

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
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    progress(f"fetching the package {HANDBOOK} (35 MB) through apt")
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        try:
            _run(["apt-get", "download", HANDBOOK], scratch)
        except (
            subprocess.CalledProcessError
        ):  # no package lists yet, or stale ones: take lists of our own, as any user can
            lists = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
            for part in ("lists/partial", "cache/archives/partial"):
                (scratch / part).mkdir(parents=True)
            _run(["apt-get", *lists, "update"], scratch)
            _run(["apt-get", *lists, "download", HANDBOOK], scratch)
        package = next(iter(sorted(scratch.glob("*.deb"))), None)
        if package is None:
            raise FileNotFoundError("apt-get left no package")
        _run(["dpkg-deb", "-x", str(package), "files"], scratch)
        pages = sorted((scratch / "files" / "usr/share/doc" / HANDBOOK / "html" / "en-US").glob("*.html"))
        if not pages:
            raise FileNotFoundError("the package holds no en-US pages")
        progress(f"reading {len(pages)} pages")
        text = "\n\n".join(strip_tags(page.read_text(encoding="utf-8")) for page in pages)
        (folder / "handbook.txt").write_text(text + "\n", encoding="utf-8")


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=True
    )


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (str(error.stderr).strip().splitlines() or [f"exit status {error.returncode}"])[-1]
    return str(error)
