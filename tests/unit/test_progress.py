"""What a run shows of itself."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from della_dist.report.display import LINE_EVERY_S, ProgressDisplay
from della_dist.report.pace import MAX_SAMPLES, Pace
from della_dist.report.progress import (
    Goal,
    ShardUnderWay,
    Snapshot,
    WorkerCounts,
    WorkerStatus,
)
from della_dist.report.progress_text import progress_line, time_left, worker_lines
from della_dist.report.text import format_bytes, format_mem, format_seconds, note_lines

MB = 1_000_000

GOAL = Goal(num_tasks=8, tasks_resumed=3, bytes_to_write=200 * MB, bytes_resumed=300 * MB)


class Clock:
    """A clock that is set by hand, and a wait that only moves it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        patch.setattr("della_dist.report.pace.time.monotonic", lambda: self.now_s)


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def half_way() -> Snapshot:
    return Snapshot("merging", tasks_done=2, bytes_read=300 * MB, bytes_written=50 * MB)


def shard(
    index: int, share: float = 0.5, age_s: float = 10, *, is_slow: bool = False
) -> ShardUnderWay:
    return ShardUnderWay(index, f"model-{index + 1}", 1, age_s, share, is_slow)


def worker(number: int, rate: float = MB, *shards: ShardUnderWay) -> WorkerStatus:
    return WorkerStatus(f"worker {number} (host{number}, pid 4711)", rate, shards)


def working(*workers: WorkerStatus, done: int = 50 * MB, work: int = 200 * MB) -> Snapshot:
    """Return a run of which so much of the work is done; as much of the output is written."""
    counts = WorkerCounts(
        workers, merged_bytes=done, work_done_bytes=done, work_bytes=work, workers_lost=1
    )
    return Snapshot("merging", 2, bytes_read=0, bytes_written=3 * done, workers=counts)


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
        assert re.fullmatch(
            r"merging: 70 %, 5/8 shards, [0-9.]+ [kMGT]?B/s, time left unknown", line
        )
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
    assert time.monotonic() - started_s < LINE_EVERY_S / 2
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
    assert "350.0 MB of 500.0 MB" in shown
    assert " 0 %" not in shown  # nor does the bar begin there
    assert re.search(r"[0-9.]+ [kMGT]?B/s", shown)
    # The bar is gone in the end: its line is erased, and the cursor is back.
    rest = terminal.getvalue()[terminal.getvalue().rindex("shards") :]
    assert "\x1b[2K" in rest
    assert "\x1b[?25h" in rest


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Return what a terminal gets under an environment."""
    terminal = make_terminal(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slow = worker(3, MB, shard(6, is_slow=True))
    with ProgressDisplay(quiet=False, refresh_s=0.01, line_every_s=0.01) as display:
        display.watch(GOAL, lambda: working(slow, worker(4, MB, shard(7))))
        wait_for(lambda: "worker 3" in terminal.getvalue())
    return terminal.getvalue()


COLOUR = re.compile(r"\x1b\[[\d;]*3[0-8]")


def test_workers_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_on_a_terminal(monkeypatch)
    assert COLOUR.search(shown)
    assert "350.0 MB of 500.0 MB, 5/8 shards" in shown
    assert "shard 7: 50 %  for 10.0 s, slow" in shown


def test_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_on_a_terminal(monkeypatch, NO_COLOR="1")
    assert not COLOUR.search(shown)
    assert "\x1b[2K" in shown  # it moves


def test_a_terminal_that_cannot_move_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_on_a_terminal(monkeypatch, TERM="dumb")
    assert "\x1b" not in shown
    assert "merging: 70 %, 5/8 shards" in shown


def test_colour_is_not_forced_upon_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = ""
    with ProgressDisplay(quiet=False, line_every_s=0.01) as display:
        display.watch(GOAL, half_way)
        while "merging" not in shown:
            shown += capsys.readouterr().err
    assert "\x1b" not in shown


def test_nothing_to_write_is_not_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with ProgressDisplay(quiet=False, refresh_s=0.01) as display:
        display.watch(Goal(1, 1, 0), lambda: Snapshot("finishing", 0, 0, 0))
        wait_for(lambda: "1/1 shards" in terminal.getvalue())
    assert "time left unknown" in terminal.getvalue()


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    clock.now_s += 2
    pace.add(Snapshot("merging", 0, 400, 100))
    assert pace.bytes_per_s == 250
    clock.now_s += 2
    pace.add(Snapshot("merging", 0, 1300, 200))
    assert pace.bytes_per_s == 375


def test_rates_forget_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    moved = 0
    for speed in (1000, 10):
        for _ in range(30):
            clock.now_s += 1
            moved += speed
            pace.add(Snapshot("merging", 0, moved, 0))
    assert pace.bytes_per_s == 10
    # A run that stands still says so.
    for _ in range(30):
        clock.now_s += 1
        pace.add(Snapshot("merging", 0, moved, 0))
    assert pace.bytes_per_s == 0


def test_rates_of_rare_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    for i in range(1, 5):
        clock.now_s += 100
        pace.add(Snapshot("merging", 0, 500 * i, 500 * i))
        assert pace.bytes_per_s == 10


def test_time_left_is_that_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of shards, of which one may be much larger; and starting does not count."""
    clock = Clock(monkeypatch)
    pace = Pace()
    for _ in range(50):  # workers start
        clock.now_s += 1
        pace.add(working(done=0))
    assert time_left(pace) == "time left unknown"
    clock.now_s += 10
    pace.add(working(done=50 * MB))
    assert pace.left_s == 30
    clock.now_s += 10
    pace.add(working(done=150 * MB))
    assert pace.left_s == pytest.approx(20 * 50 / 150)


def test_time_left_while_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are merged as a whole are written minutes apart."""
    clock = Clock(monkeypatch)
    pace = Pace()
    for done in (100, 100, 100, 200, 200, 200, 300):
        clock.now_s += 100
        pace.add(working(done=done, work=1000))
    # 600 s, of which the last half counts.
    assert pace.left_s == pytest.approx(700 * 300 / 100)


def test_time_left_of_the_slowest_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    pace.add(working(done=0))
    clock.now_s += 10
    late = worker(0, 1, shard(7, share=0.25, age_s=100))
    pace.add(working(late, done=199 * MB))
    assert pace.left_s == 300
    # A second attempt that is faster counts; of one that has just begun nothing is known.
    second = worker(1, MB, shard(7, share=0.5, age_s=20))
    pace.add(working(late, second, worker(2, MB, shard(8, share=0.01)), done=199 * MB))
    assert pace.left_s == 20


def test_a_long_run_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    for done in range(1, 20_000):
        clock.now_s += 0.25
        pace.add(working(done=done, work=40_000))
    assert len(pace._done) <= MAX_SAMPLES
    assert pace.left_s == pytest.approx(20_001 * 0.25, rel=0.01)


def test_what_is_written_twice_counts_once() -> None:
    now = working(done=20 * MB)
    assert now.bytes_written == 60 * MB
    assert GOAL.done_bytes(now) == 320 * MB


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("num_workers", [1, 8, 64])
def test_workers_fit(width: int, num_workers: int) -> None:
    workers = [
        worker(i, (100 + i) * MB, shard(2 * i + 1000), shard(2 * i + 1001))
        for i in range(num_workers)
    ]
    lines = worker_lines(workers, 18, width)
    assert all(len(line) <= width for line, _ in lines)
    assert not any(is_slow for _, is_slow in lines)
    assert len(lines) == (5 if num_workers == 64 else num_workers)
    assert f"{100.0:.1f} MB/s  shard 1001: 50 %, 1002: 50 %  for 10.0 s" in lines[0][0]
    if num_workers == 64:  # the slowest few, and what the others do
        assert [line.split()[1] for line, _ in lines[:4]] == ["0", "1", "2", "3"]
        assert lines[4][0] == "  60 more: 104.0 MB/s to 163.0 MB/s"


def test_who_is_slow_comes_first() -> None:
    workers = [worker(i, i * MB, shard(i)) for i in range(10)]
    workers[9] = worker(9, 90 * MB, shard(9, is_slow=True, age_s=100))
    (first, is_slow), *_ = worker_lines(workers, 20, 80)
    assert "worker 9" in first
    assert first.endswith("for 1 min 40 s, slow")
    assert is_slow
    # Those without work are not slow.
    workers[0] = worker(0, 0)
    shown = [line for line, _ in worker_lines(workers, 20, 80)]
    assert not any("worker 0 " in line for line in shown)
    assert worker_lines(workers[:1], 20, 80)[0][0].split()[-1] == "waits"
    # However low the terminal is.
    assert len(worker_lines(workers, 1, 80)) == 1
    assert worker_lines(workers, 0, 80) == []


def test_a_line_names_who_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace()
    pace.add(working(done=0))
    clock.now_s += 10
    now = working(worker(3, MB, shard(6, is_slow=True)), worker(4, 2 * MB, shard(7)))
    pace.add(now)
    assert progress_line(GOAL, now, pace) == (
        "merging: 70 %, 5/8 shards, 15.0 MB/s, 30.0 s left, 2 workers (1.0 MB/s to 2.0 MB/s), "
        "1 slow, 1 lost; slow: worker 3 (host3, pid 4711) has shard 7 (50 % in 10.0 s)"
    )


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
