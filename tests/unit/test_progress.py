"""What is shown while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest

from crossbit.engine.progress import Reporter, Stage


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("crossbit.engine.progress.time", SimpleNamespace(monotonic=found.monotonic))
    monkeypatch.setattr("crossbit.engine.progress.memory_gib", lambda: 1.25)
    return found


@pytest.fixture(autouse=True)
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, where there is one, of 80 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def reporter_on(stream: io.StringIO, *, quiet: bool = False) -> Reporter:
    """A reporter whose stderr is ``stream``."""
    with redirect_stderr(stream):
        reporter = Reporter(quiet)
    reporter.console.file = stream
    return reporter


def shown(terminal: Terminal) -> str:
    """All that was written, without colours, cursor movements and the line breaks of a wrap."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    return " ".join(plain.split())


DOING = "step 7/384, training loss 0.0123, held-out hard loss 0.0456 -> 0.0321, 1234 tokens/s"


def windows(reporter: Reporter, step: Callable[[int], None], count: int = 3) -> None:
    """A stage of windows, of which ``step`` is called with the numbers."""
    for index in reporter.track(range(count), "training windows", count):
        step(index)


# -- the time that is left ------------------------------------------------------------------------


def test_time_left_counts_a_share_of_the_first_item(clock: Clock) -> None:
    stage = Stage("windows", [1.0, 1.0, 2.0])
    clock.now += 5
    assert stage.left == "?"
    stage.at(0.25)
    assert stage.left == "0:01:15"  # a quarter of four quarters of four
    clock.now += 5
    stage.at(0.5)
    assert stage.left == "0:01:10"


def test_time_left_counts_weights(clock: Clock) -> None:
    stage = Stage("windows", [1.0, 3.0, 2.0])
    clock.now += 10
    stage.finish()
    assert (stage.left, stage.count, stage.finished) == ("0:00:50", "1/3", False)
    clock.now += 30
    stage.finish()
    assert stage.left == "0:00:20"
    clock.now += 20
    stage.finish()
    assert (stage.left, stage.count, stage.finished) == ("0:00:00", "3/3", True)


def test_what_an_earlier_run_did_is_not_this_ones_pace(clock: Clock) -> None:
    stage = Stage("windows", [2.0, 2.0])
    stage.at(0.75, before=True)
    assert stage.reached == 1.5
    assert stage.left == "?"
    clock.now += 10
    stage.at(1.0)
    assert stage.left == "0:00:40"  # 0.5 in 10 s, 2.0 of them left


def test_a_window_that_is_rolled_back_has_no_pace_yet(clock: Clock) -> None:
    stage = Stage("windows", [1.0])
    stage.at(0.5, before=True)
    clock.now += 10
    stage.at(0.0)
    assert stage.left == "?"


def test_a_first_step_is_no_pace(clock: Clock) -> None:
    stage = Stage("windows", [1.0] * 30)
    clock.now += 72  # an evaluation before the first of 2240 steps
    stage.at(1 / 2240)
    assert stage.left == "?"
    clock.now += 28
    stage.at(0.01)
    assert stage.left == "3 days, 11:18:20"


def test_a_stage_of_nothing_has_no_pace() -> None:
    assert Stage("windows", []).left == Stage("windows", [0.0]).left == "?"


# -- on a terminal --------------------------------------------------------------------------------


def test_a_terminal_shows_it_all(clock: Clock) -> None:
    terminal = Terminal()
    reporter = reporter_on(terminal)

    def step(index: int) -> None:
        clock.now += 60
        reporter.status(f"blocks {index}-{index + 1}: {DOING}", 0.5)
        assert reporter._display is not None
        reporter.say("shown now")
        reporter._display.refresh()  # which it does by itself ten times a second
        assert reporter._display.tasks[0].completed == index + 0.5

    windows(reporter, step)
    found = shown(terminal)
    first, second = (found.split("shown now")[n] for n in (1, 2))
    assert "training windows" in first
    assert "0/3" in first
    assert "0:05:00 left" in first  # half a window in 60 s, two and a half are left
    assert "1.25 GiB" in first
    assert f"blocks 0-1: {DOING}" in first
    assert "1/3" in second
    assert f"blocks 1-2: {DOING}" in second
    assert found.rstrip().endswith("1.25 GiB")
    assert "3/3" in found


def test_outcomes_stay_on_a_terminal(clock: Clock) -> None:
    terminal = Terminal()
    reporter = reporter_on(terminal)
    windows(reporter, lambda index: reporter.outcome(f"blocks {index}: 0.5 -> 0.25"))
    lines = re.findall(r"blocks \d: 0\.5 -> 0\.25\r?\n", terminal.getvalue())
    assert [line.strip() for line in lines] == [f"blocks {i}: 0.5 -> 0.25" for i in range(3)]


def test_after_a_stage_lines_are_lines(clock: Clock) -> None:
    terminal = Terminal()
    reporter = reporter_on(terminal)
    windows(reporter, lambda _: None)
    written = len(terminal.getvalue())
    clock.now += 100
    reporter.status("alone", 0.5)
    reporter.outcome("ended")
    assert terminal.getvalue()[written:] == "alone\nended\n"


def test_a_stage_that_fails_gives_the_terminal_back(clock: Clock) -> None:
    terminal = Terminal()
    reporter = reporter_on(terminal)

    def step(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        windows(reporter, step)
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor


# -- elsewhere ------------------------------------------------------------------------------------


def test_a_pipe_gets_a_line_for_each_outcome(clock: Clock) -> None:
    pipe = io.StringIO()
    reporter = reporter_on(pipe)

    def step(index: int) -> None:
        clock.now += 2
        if index != 1:
            reporter.outcome(f"blocks {index}-{index + 1}: held-out loss 0.5 -> 0.25")

    windows(reporter, step)
    assert pipe.getvalue().splitlines() == [
        "training windows: 1/3, 0:00:02, 0:00:04 left, 1.25 GiB; "
        "blocks 0-1: held-out loss 0.5 -> 0.25",
        "training windows: 3/3, 0:00:06, 0:00:00 left, 1.25 GiB; "
        "blocks 2-3: held-out loss 0.5 -> 0.25",
    ]


def test_a_pipe_gets_a_line_now_and_then(clock: Clock) -> None:
    """Of items every 10 seconds, and of what is done with one every 30."""
    pipe = io.StringIO()
    reporter = reporter_on(pipe)

    def step(index: int) -> None:
        for part in range(4):
            clock.now += 1
            reporter.status(f"part {part} of {index}", (part + 1) / 4)

    windows(reporter, step, 11)
    assert pipe.getvalue().splitlines() == [
        "training windows: 0/11, 0:00:01, 0:00:43 left, 1.25 GiB; part 0 of 0",
        "training windows: 3/11, 0:00:12, 0:00:32 left, 1.25 GiB",
        "training windows: 6/11, 0:00:24, 0:00:20 left, 1.25 GiB",
        "training windows: 7/11, 0:00:31, 0:00:13 left, 1.25 GiB; part 2 of 7",
        "training windows: 9/11, 0:00:36, 0:00:08 left, 1.25 GiB",
        "training windows: 11/11, 0:00:44, 0:00:00 left, 1.25 GiB",
    ]


def test_a_pipe_with_colours_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe = io.StringIO()
    windows(reporter_on(pipe), lambda _: None)
    assert pipe.getvalue() == "training windows: 3/3, 0:00:00, 0:00:00 left, 1.25 GiB\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet_says_nothing(stream: type[io.StringIO], clock: Clock) -> None:
    found = stream()
    reporter = reporter_on(found, quiet=True)

    def step(index: int) -> None:
        clock.now += 100
        reporter.say("said")
        reporter.resumed(0.1)
        reporter.status("status", 0.5)
        reporter.outcome("outcome")

    windows(reporter, step)
    step(0)
    assert found.getvalue() == ""


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_items_are_handed_on(stream: type[io.StringIO]) -> None:
    for quiet in (True, False):
        reporter = reporter_on(stream(), quiet=quiet)
        assert list(reporter.track(iter("abc"), "letters", 3, [1.0, 2.0, 3.0])) == ["a", "b", "c"]
