"""The display of a long run's stages: what it announces, when it writes a line, and the time that it says is left."""

import sys

import pytest

from surgeon.compiler.system.stages import Forecast, Stage, StageDisplay, duration, expect, stage_display

FORECAST = Forecast((Stage("measuring", 100.0), Stage("validating", 50.0), Stage("validating again", 30.0)), 4.7e9)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(clock: Clock) -> tuple[StageDisplay, list[str]]:
    lines: list[str] = []
    return StageDisplay(lines.append, clock=clock), lines


def test_the_needs_are_said_before_the_first_step() -> None:
    display, lines = shown(Clock())
    expect(display, lambda: FORECAST)
    assert lines == ["3 stages, about 3 min and 4.7 GB of memory in all"]


def test_only_a_display_of_stages_makes_a_forecast() -> None:
    def forecast() -> Forecast:
        raise AssertionError("a prompt was timed for nobody")

    expect(None, forecast)
    expect(lambda what, done, total: None, forecast)


def test_a_stage_has_its_line_with_the_time_that_is_left() -> None:
    clock = Clock()
    display, lines = shown(clock)
    display.expect(FORECAST)
    for now, what, done in ((0, "measuring all", 0), (30, "measuring all", 1), (50, "measuring all", 2)):
        clock.now = now
        display(what, done, 4)
    clock.now = 110
    display("validating the first", 0, 2)
    assert lines[1:] == [
        "stage 1 of 3, measuring all: 0 s so far, about 3 min left",
        "stage 2 of 3, validating the first: 2 min so far, about 80 s left",
    ]


def test_a_long_stage_has_a_line_a_minute() -> None:
    clock = Clock()
    display, lines = shown(clock)
    display.expect(FORECAST)
    for done in range(5):
        clock.now = 40.0 * done
        display("measuring", done, 5)
    assert lines[2:] == [
        "stage 1 of 3, measuring, 2 of 5 done: 80 s so far, about 2 min left",
        "stage 1 of 3, measuring, 4 of 5 done: 3 min so far, about 2 min left",
    ]


def test_stages_do_not_go_back_and_unknown_steps_belong_to_the_present_one() -> None:
    display, lines = shown(Clock())
    display.expect(FORECAST)
    for what in ("validating one", "validating again", "validating one", "sorting"):
        display(what, 0, 1)
    assert [line.split(",")[0] for line in lines[1:]] == ["stage 2 of 3"] * 4


def test_without_a_forecast_a_step_is_named_and_timed() -> None:
    display, lines = shown(Clock())
    display("compiling", 0, 7)
    assert lines == ["compiling: 0 s so far"]


def test_a_bar_takes_the_steps_and_the_lines_keep_the_needs() -> None:
    lines: list[str] = []
    moved: list[tuple[str, int, int]] = []
    display = StageDisplay(lines.append, lambda *step: moved.append(step))
    display.expect(FORECAST)
    display("measuring", 1, 2)
    assert len(lines) == 1
    assert moved == [("measuring", 1, 2)]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1.7 h"), (9e4, "25.0 h")],
)
def test_times_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_only_the_main_process_shows_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_display() as display:
        assert display is not None
        display("working", 0, 2)
    assert capsys.readouterr().err == "surgeon: working: 0 s so far\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with stage_display() as display:
        assert display is None
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(sys, "stderr", None)
    with stage_display() as display:
        assert display is None
