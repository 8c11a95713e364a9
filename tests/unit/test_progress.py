"""What a run shows of itself."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from della_dist.report import progress
from della_dist.report.progress import Goal, ProgressDisplay, Snapshot
from della_dist.report.text import format_bytes, format_mem, format_seconds, note_lines

MB = 1_000_000

GOAL = Goal(num_tasks=8, tasks_resumed=3, bytes_to_write=200 * MB, bytes_resumed=300 * MB)


class Clock:
    """A clock that is set by hand, and a wait that only moves it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        patch.setattr("della_dist.report.progress.time.monotonic", lambda: self.now_s)


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def half_way() -> Snapshot:
    return Snapshot("merging", tasks_done=2, bytes_read=300 * MB, bytes_written=50 * MB)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    looks: list[Snapshot] = []

    def snapshot() -> Snapshot:
        looks.append(half_way())
        return looks[-1]

    with ProgressDisplay(quiet=False, line_every_s=0.01) as display:
        display.watch(GOAL, snapshot)
        wait_for(lambda: len(looks) >= 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *lines = captured.err.splitlines()
    assert first == "continuing: 3 of 8 shards are done already"
    assert len(lines) == len(looks)
    for line in lines:
        assert re.fullmatch(r"merging: 70 %, 5/8 shards, [0-9.]+ [kMGT]?B/s, .+ left", line)
    assert "\x1b" not in captured.err


NOTES = ("rescale: " + "some words " * 20 + "end.", "/a/path/" + "x" * 90 + " is long\x1b[2J.")


def test_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(quiet=False) as display:
        display.watch(Goal(8, 0, MB, notes=NOTES), half_way)
    escaped = NOTES[1].replace("\x1b", "\\x1b")
    assert capsys.readouterr() == ("", f"note    {NOTES[0]}\nnote    {escaped}\n")
    with ProgressDisplay(quiet=True) as display:
        display.watch(Goal(8, 0, MB, notes=NOTES), half_way)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [30, 80, 200])
def test_notes_are_broken_between_words(width: int) -> None:
    lines = note_lines(NOTES, width)
    assert [line for line in lines if line.startswith("note    ")] == [
        line for line in lines if not line.startswith("        ")
    ]
    assert len([line for line in lines if line.startswith("note")]) == 2
    assert all(len(line) <= width or "xxx" in line for line in lines)
    words = " ".join(line[8:] for line in lines).split()
    assert words == " ".join(NOTES).replace("\x1b", "\\x1b").split()


def test_notes_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with ProgressDisplay(quiet=False) as display:
        display.watch(Goal(8, 0, MB, notes=NOTES[:1]), half_way)
    first, second, *_ = terminal.getvalue().splitlines()
    assert first.startswith("note    rescale: some words")
    assert 100 < len(first) <= 120  # as wide as the terminal
    assert second.startswith("        ")


def test_no_line_before_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    # A short run shows nothing at all, and does not wait for the next line when it ends.
    started_s = time.monotonic()
    with ProgressDisplay(quiet=False) as display:
        display.watch(Goal(8, 0, MB), half_way)
    assert time.monotonic() - started_s < progress.LINE_EVERY_S / 2
    assert capsys.readouterr() == ("", "")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def snapshot() -> Snapshot:
        raise AssertionError("nobody looks")

    with ProgressDisplay(quiet=True, line_every_s=0.001) as display:
        display.watch(GOAL, snapshot)
        time.sleep(0.02)
    assert capsys.readouterr() == ("", "")


def test_never_watched() -> None:
    with ProgressDisplay(quiet=False):
        pass


def test_errors_pass_through() -> None:
    def fail() -> None:
        with ProgressDisplay(quiet=False) as display:
            display.watch(Goal(1, 0, 0), half_way)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal. No fixture: pytest captures anew when the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with ProgressDisplay(quiet=False, refresh_s=0.01) as display:
        display.watch(GOAL, half_way)
        wait_for(lambda: "5/8 shards" in terminal.getvalue())
        shown = terminal.getvalue()
    assert "merging" in shown
    assert "70 %" in shown
    assert " 0 %" not in shown  # nor does the bar begin there
    assert re.search(r"[0-9.]+ [kMGT]?B/s", shown)
    # The bar is gone in the end: its line is erased, and the cursor is back.
    rest = terminal.getvalue()[terminal.getvalue().rindex("shards") :]
    assert "\x1b[2K" in rest
    assert "\x1b[?25h" in rest


def test_nothing_to_write_is_not_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with ProgressDisplay(quiet=False, refresh_s=0.01) as display:
        display.watch(Goal(1, 1, 0), lambda: Snapshot("finishing", 0, 0, 0))
        wait_for(lambda: "1/1 shards" in terminal.getvalue())
    assert "time left unknown" in terminal.getvalue()


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = progress._Rate()
    clock.now_s += 2
    rate.add(500, 100)
    assert (rate.bytes_per_s, rate.written_per_s) == (250, 50)
    clock.now_s += 2
    rate.add(1500, 200)
    assert (rate.bytes_per_s, rate.written_per_s) == (375, 50)


def test_rates_forget_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = progress._Rate()
    moved = 0
    for speed in (1000, 10):
        for _ in range(30):
            clock.now_s += 1
            moved += speed
            rate.add(moved, moved)
    assert rate.bytes_per_s == 10
    # A run that stands still says so.
    for _ in range(30):
        clock.now_s += 1
        rate.add(moved, moved)
    assert rate.bytes_per_s == 0


def test_rates_of_rare_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = progress._Rate()
    for i in range(1, 5):
        clock.now_s += 100
        rate.add(1000 * i, 500 * i)
        assert (rate.bytes_per_s, rate.written_per_s) == (10, 5)


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = progress._Rate()
    assert progress._left(GOAL, Snapshot("merging", 0, 0, 0), rate) == "time left unknown"
    clock.now_s += 10
    rate.add(0, 50 * MB)
    assert progress._left(GOAL, half_way(), rate) == "30.0 s left"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (476_200_000, "476.2 MB"),
        (999_949, "999.9 kB"),
        (15e9, "15.0 GB"),
        (2.04e12, "2.04 TB"),
        (2.04e15, "2040.00 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 MiB"), (256 << 20, "256 MiB"), (1 << 30, "1.0 GiB"), (3 << 29, "1.5 GiB")],
)
def test_mem(count: int, text: str) -> None:
    assert format_mem(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (200.4, "3 min 20 s"),
        (119.6, "2 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("seconds", [59.96, 59.999])
def test_no_sixty_seconds(seconds: float) -> None:
    assert format_seconds(seconds) == "1 min 00 s"


@pytest.mark.parametrize(("count", "text"), [(999_960, "1.0 MB"), (999_999_999, "1.0 GB")])
def test_no_thousand_of_a_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_one_merge_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several stages each is announced, and shown in the place of the one before."""
    looks: list[str] = []

    def look(name: str) -> Callable[[], Snapshot]:
        def now() -> Snapshot:
            looks.append(name)
            return Snapshot("merging", 0, 0, 0)

        return now

    with ProgressDisplay(quiet=False, line_every_s=0.01) as display:
        for name in ("one", "two"):
            display.watch(Goal(1, 0, 100, stage=f"stage {name}"), look(name))
            wait_for(lambda name=name: name in looks)  # type: ignore[misc]
        looks.clear()
        wait_for(lambda: len(looks) > 3)
        assert set(looks) == {"two"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "stage one"
    assert [line for line in lines if line.startswith("stage ")] == ["stage one", "stage two"]
