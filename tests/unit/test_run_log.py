"""The log of a run: who is shown what, and lines of JSON that nothing can spoil."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from della_dist.errors import ConfigError
from della_dist.report import run_events
from della_dist.report.run_events import MergeEnded, RunEvent, ShardFailed, WorkerIsReady
from della_dist.report.run_log import HISTORY, NOTHING, UNSEEN, JsonLines, lines_to, log, tell

ROOT = Path(__file__).parents[2]
READY = WorkerIsReady("worker 3 (host, pid 4711)")


@pytest.fixture(autouse=True)
def nobody_else_listens() -> Iterator[None]:
    before = log.handlers, log.level
    log.handlers = [logging.NullHandler()]
    yield
    log.handlers, level = before
    log.setLevel(level)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_words_and_events_on_one_stream(tmp_path: Path) -> None:
    """Neither writes over the other, though the shell opened the file without appending."""
    program = (
        "import sys; from della_dist.report.run_log import JsonLines, log\n"
        "with JsonLines('/dev/stderr'):\n"
        "    for i in range(3):\n"
        "        log.warning('event %d', i); print('words', i, file=sys.stderr, flush=True)\n"
    )
    with (tmp_path / "err").open("wb") as err:
        subprocess.run([sys.executable, "-c", program], stderr=err, check=True, cwd=ROOT)
    lines = (tmp_path / "err").read_text().splitlines()
    assert [line for line in lines if line.startswith("words")] == [f"words {i}" for i in range(3)]
    told = [json.loads(line)["message"] for line in lines if line.startswith("{")]
    assert told == [f"event {i}" for i in range(3)]
    assert len(lines) == 6


def test_lines_as_they_happen(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    with JsonLines(str(path)):
        tell(READY)
        (line,) = read(path)  # at once
        assert list(line) == ["time", "event", "worker"]
        assert line["worker"] == READY.worker
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        happened = datetime.fromisoformat(line["time"].replace("Z", "+00:00"))
        assert abs(happened.timestamp() - datetime.now().timestamp()) < 60
        log.warning("the store is slow")
        log.info("hello")
        log.debug("a detail")
        log.log(HISTORY, "all of it")
        tell(READY, UNSEEN)
    tell(READY)
    assert [(one["event"], one.get("level")) for one in read(path)] == [
        ("worker_ready", None),
        ("message", "warning"),
        ("message", "info"),
        ("worker_ready", None),
    ]
    with JsonLines(str(path)):  # the same command continues
        tell(READY)
    assert len(read(path)) == 5


def test_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    with JsonLines(str(path)):
        tell(READY)
        tell(READY)
    path.write_text(path.read_text()[:-20])
    with JsonLines(str(path)):
        tell(READY)
    first, cut, last = path.read_text().splitlines()
    assert json.loads(first)["event"] == json.loads(last)["event"] == "worker_ready"
    assert not cut.endswith("}")


@pytest.mark.parametrize(
    "content", ["merge_method: della\n", "{\n}", '{"weight_map": {}}', "[1]", "\n", "\0\xff"]
)
def test_no_other_file_is_written_to(tmp_path: Path, content: str) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="no log of runs"):
        JsonLines(str(path))
    assert path.read_text() == content


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "log.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            JsonLines(str(path))
    with pytest.raises(ConfigError, match="/dev/stderr"):
        JsonLines("-")


def test_a_full_disk_ends_no_run() -> None:
    said: list[str] = []
    with lines_to(said.append), JsonLines("/dev/full"):
        for _ in range(3):
            tell(READY)
    assert said == [
        "/dev/full could not be written (No space left on device): events are lost from here on"
    ]


def test_no_credentials_and_no_bare_nan(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    with JsonLines(str(path)):
        tell(ShardFailed("a", 1, "worker 1", "s3://KEY:SECRET@bucket/x", is_retried=True))
        nested = {"output": "s3://KEY:SECRET@bucket/x", "model_digest": "", "energy": float("nan")}
        tell(MergeEnded("", nested))
        log.warning("reading %s", "s3://KEY:SECRET@bucket/x")
    text = path.read_text()
    assert "SECRET" not in text
    assert "NaN" not in text
    assert read(path)[1]["energy"] is None


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (NOTHING, []),
        (logging.INFO, ["important"]),
        (logging.DEBUG, ["important", str(READY)]),
        (HISTORY, ["important", str(READY), "history"]),
    ],
)
def test_who_is_shown_what(level: int, shown: list[str]) -> None:
    said: list[str] = []
    inner: list[str] = []

    def all_of_it() -> None:
        log.warning("important")
        tell(READY)
        log.log(HISTORY, "history")
        tell(READY, UNSEEN)

    with lines_to(said.append, level):
        with lines_to(inner.append):  # as while a bar is drawn
            all_of_it()
        assert said == []
        all_of_it()
    assert inner == said == shown


def test_the_readme_has_every_key() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## What is shown\n")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section.partition("\n## ")[0], re.MULTILINE))
    events = [
        event
        for event in vars(run_events).values()
        if isinstance(event, type) and issubclass(event, RunEvent) and event is not RunEvent
    ]
    assert len(events) > 10
    for event in events:
        keys = {field.name for field in fields(event)}
        if event is MergeEnded:
            keys.remove("summary")
        named = set(re.findall(r"`(\w+)`", rows[event.kind]))
        assert keys <= named, (event.kind, keys - named)
    assert "message" in rows
