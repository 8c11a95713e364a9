"""Writing one object through fsspec's general interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from della_dist.storage.remote.retry import failing
from della_dist.storage.store import Bytes, ObjectStat, as_bytes


class RemoteWriter:
    """Writes one object through fsspec; it appears at `commit`, or never.

    Parameters
    ----------
    file
        Open for writing, under a name that nobody looks at.
    doing
        For errors.
    publish, discard
        Give the closed file its name; remove it.
    size_bytes
        Of the whole object, if known.
    """

    def __init__(
        self,
        file: Any,  # noqa: ANN401
        doing: str,
        publish: Callable[[], ObjectStat],
        discard: Callable[[], None],
        size_bytes: int | None,
    ) -> None:
        self._file = file
        self._doing = doing
        self._publish = publish
        self._discard = discard
        self._size_bytes = size_bytes
        self.num_written = 0

    def write(self, buffer: Bytes) -> None:
        """Append `buffer`."""
        data = as_bytes(buffer)
        with failing(self._doing):  # repeating it is fsspec's to do: it knows what was sent
            self._file.write(data)
        self.num_written += data.nbytes

    def commit(self) -> ObjectStat:
        """Make the object visible."""
        if self._size_bytes is not None and self.num_written != self._size_bytes:
            raise AssertionError(f"{self.num_written} of {self._size_bytes} bytes were written")
        with failing(self._doing):
            self._file.close()
        stat = self._publish()
        self._file = None
        return stat

    def abort(self) -> None:
        """Throw away what was written. Harmless after `commit` and when repeated."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # the next run clears it away
                file.close()
                self._discard()

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
