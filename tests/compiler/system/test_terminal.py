"""The terminal: progress only if there is one, and only the characters that it has."""

import sys

import pytest

from surgeon.compiler.system.terminal import can_show, progress_bar, stdout_encoding


class Screen:
    """A standard error that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        self.text = ""
        self.is_terminal = is_terminal

    encoding = "utf-8"

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as progress:
        assert progress is not None
        progress("building [cpu]", 2, 7)
    assert "building [cpu]" in screen.text
    assert "2/7" in screen.text


def test_progress_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as progress:
        assert progress is None
    assert screen.text == ""


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", True), ("latin-1", False), ("ascii", False), ("no-such-encoding", False)]
)
def test_an_encoding_has_characters_or_not(encoding: str, shown: bool) -> None:
    assert can_show(encoding, "─±–") == shown


def test_a_closed_standard_output_takes_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Screen(is_terminal=False))
    assert stdout_encoding() == "utf-8"
    monkeypatch.setattr(sys, "stdout", None)
    assert stdout_encoding() == "ascii"
