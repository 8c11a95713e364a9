"""The log of a run: lines for a person, and lines of JSON for programs.

What happens is told once, to the logger ``della_dist.run``: as a line, and where programs may want
to know of it, as a `RunEvent`. Each reader takes what it is for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from della_dist.errors import ConfigError
from della_dist.locations import masked
from della_dist.report.run_events import RunEvent

#: The logger of runs.
NAME = "della_dist.run"
#: Below `logging.DEBUG`: what a person is shown with ``--debug`` alone.
HISTORY = 5
#: Below all that a person is shown.
UNSEEN = 1
#: Above every level.
NOTHING = logging.CRITICAL + 1
#: Of the first line of a file that is written on; the lines of runs are no longer.
_FIRST_LINE_BYTES = 1 << 20

log = logging.getLogger(NAME)
_LISTENERS: list[Callable[[RunEvent], None]] = []


def tell(event: RunEvent, level: int = logging.DEBUG) -> None:
    """Log an event, of a level at which a person is to see its line: at first with ``-v``."""
    log.log(level, "%s", event, extra={"event": event})
    for listener in _LISTENERS:
        listener(event)


@contextlib.contextmanager
def told_to(listener: Callable[[RunEvent], None]) -> Iterator[None]:
    """Call `listener` with every event, whatever is logged."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


class _Lines(logging.Handler):
    """Shows a record as a line."""

    def __init__(self, say: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._say(masked(record.getMessage()))


@contextlib.contextmanager
def lines_to(say: Callable[[str], None], level: int | None = None) -> Iterator[None]:
    """Show the log of runs through `say`, instead of where it was shown before.

    Parameters
    ----------
    say
        Called with each line.
    level
        Of the least important ones; None: as before.
    """
    before = [handler for handler in log.handlers if isinstance(handler, _Lines)]
    if level is None:
        level = min((handler.level for handler in before), default=logging.INFO)
    handler = _Lines(say, level)
    log_level = log.level
    log.setLevel(UNSEEN)  # handlers choose
    for old in before:
        log.removeHandler(old)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for old in before:
            log.addHandler(old)
        log.setLevel(log_level)


class JsonLines(logging.Handler):
    """Appends a line of JSON to a file for every event, as it happens. A context manager.

    A file that cannot be written to any more ends no run: what follows is lost, and one warning is
    logged.

    Parameters
    ----------
    path
        Of the file; made if need be, continued if it holds such lines.

    Raises
    ------
    ConfigError
        If it cannot be written, or holds something else.
    """

    def __init__(self, path: str) -> None:
        super().__init__(UNSEEN)  # `filter` chooses
        unfinished = check_json_lines(path)
        self._path = path
        self._failed = False
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            for stream in (1, 2):  # one place to write at for both
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(stream), os.fstat(self._file)):
                        os.dup2(stream, self._file, inheritable=False)
        except OSError as error:
            raise _unusable(path, error) from error
        if unfinished:
            self._write(b"\n")

    def filter(self, record: logging.LogRecord) -> bool:
        """Take every event, and of what else is logged that which a person is shown."""
        return hasattr(record, "event") or record.levelno >= logging.INFO

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not self._failed:
            self._write(f"{json.dumps(as_json(record))}\n".encode())

    def _write(self, line: bytes) -> None:
        try:
            while line:  # a pipe may take less than all
                line = line[os.write(self._file, line) :]
        except OSError as error:
            self._failed = True
            log.warning(
                "%s could not be written (%s): events are lost from here on",
                self._path,
                error.strerror,
            )

    def __enter__(self) -> JsonLines:
        self._level_before = log.level
        log.setLevel(UNSEEN)
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)
        log.setLevel(self._level_before)
        os.close(self._file)


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line of JSON says of a record, without credentials."""
    happened = datetime.fromtimestamp(record.created, timezone.utc)
    content: dict[str, Any] = {
        "time": happened.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    }
    event = getattr(record, "event", None)
    if isinstance(event, RunEvent):
        content |= {"event": event.kind, **event.facts()}
    else:
        content |= {
            "event": "message",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
    plain: dict[str, Any] = _plain(content)
    return plain


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a value as JSON can say it, without credentials."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_json_lines(path: str) -> bool:
    """Return whether the last line of a log of runs has no end, as after a kill.

    Raises
    ------
    ConfigError
        If there is a file that is something else, and not to be written to.
    """
    if path == "-":
        raise ConfigError("--log-json -: name a file; /dev/stderr and /dev/fd/3 are files, too.")
    last = b"\n"
    try:
        found = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return False
        with open(path, "rb") as file:  # noqa: PTH123
            first = file.readline(_FIRST_LINE_BYTES)
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        content = json.loads(first)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"time", "event"} <= content.keys():
        raise ConfigError(
            f"--log-json {path}: there is a file which is no log of runs. Name another; one that "
            "is there is written on only where it holds such lines."
        )
    return last != b"\n"


def _unusable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"--log-json {path}: it cannot be written ({error.strerror}). Name another.")
