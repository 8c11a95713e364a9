"""Standard output and error of a program that outlives whoever reads them.

A closed terminal, a full disk or ``| head`` must not end a merge that runs for a day, nor make one
that is done look as if it had failed.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Lenient(io.FileIO):
    """A stream that never fails: from the first failure on it drops what is written."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        size = memoryview(data).nbytes
        if self.failure is not None:
            return size
        try:
            while (written := super().write(data)) is None:  # a pipe that is full and may not block
                select.select([], [self], [])
        except OSError as error:
            self.failure = error
            return size
        return written


def guard() -> None:
    """From now on, stdout and stderr of this process never fail. For whole programs only."""
    # Where one of the first three descriptors is closed, the next file that is opened would get its
    # number, and what libraries print.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is sys.__stdout__:  # else it is the caller's own
        sys.stdout = _lenient(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lenient(sys.stderr, 2)


def _lenient(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # it was closed when Python started
        raw = _Lenient(os.devnull, "w")
    else:
        with contextlib.suppress(OSError):
            stream.flush()
        raw = _Lenient(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",  # names of files need not be valid Unicode
        line_buffering=descriptor == 2 or raw.isatty(),
    )


def lost_output() -> OSError | None:
    """Return why something that was written to stdout did not get out, None if all of it did."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Lenient) else None
