"""Writing one object of S3 as a stream: multipart, several parts at once, bounded memory."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from della_dist.errors import StorageError
from della_dist.storage.store import Bytes, ObjectStat, as_bytes

if TYPE_CHECKING:
    from della_dist.storage.s3 import S3Store

#: Of a part: at least 5 MiB, but for the last; all the same, which R2 wants.
MIN_PART_BYTES = 8 << 20
MAX_PARTS = 10_000
#: Parts of one object that are on their way at once, beyond the one that is being filled.
UPLOADS_IN_FLIGHT = 2
#: An upload that stays behind is cleared away at the end of the run, or by the next.
ABORT_PATIENCE_S = 10.0


def part_bytes(size_bytes: int | None) -> int:
    """Return the size of the parts of an object of `size_bytes` (5 TB if unknown).

    8 MiB up to 78 GiB; only a shard that is larger, of one tensor, needs more memory.
    """
    size_bytes = 5 * 10**12 if size_bytes is None else size_bytes
    step = 1 << 20
    return max(MIN_PART_BYTES, -(-size_bytes // MAX_PARTS // step) * step)


class MultipartWriter:
    """Writes one object from beginning to end; it appears at `commit`, or never.

    Objects of less than one part are written by a single request. Use from one thread at a time.
    """

    def __init__(self, store: S3Store, key: str, size_bytes: int | None, part_size: int) -> None:
        self._store = store
        self._key = key
        self._size_bytes = size_bytes
        self._part_size = part_size
        self._upload: str | None = None
        self._part = io.BytesIO()
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self._parts: list[dict[str, Any]] = []
        self._num_parts = 0
        self._open = True
        self.num_written = 0

    def write(self, buffer: Bytes) -> None:
        """Append `buffer`; waits where too many parts are on their way."""
        rest = as_bytes(buffer)
        while rest.nbytes:
            taken = rest[: self._part_size - self._part.tell()]
            self._part.write(taken)
            self.num_written += taken.nbytes
            rest = rest[taken.nbytes :]
            if self._part.tell() == self._part_size and rest.nbytes:
                self._send()

    def commit(self) -> ObjectStat:
        """Complete the object: it is there, all of it, or not at all."""
        if self._size_bytes is not None and self.num_written != self._size_bytes:
            raise AssertionError(f"{self.num_written} of {self._size_bytes} bytes were written")
        if self._upload is None:
            stat = self._store.put(self._key, self._part.getvalue())
        else:
            self._send()
            while self._pending:
                self._parts.append(self._pending.popleft().result())
            stat = self._store.finish_upload(self._key, self._upload, self._parts, self.num_written)
        self._open = False
        self._part = io.BytesIO()
        return stat

    def abort(self) -> None:
        """Throw away what was written. Harmless after `commit` and when repeated."""
        if not self._open:
            return
        self._open = False
        self._part = io.BytesIO()
        for future in self._pending:
            if not future.cancel():
                future.exception()  # a part that arrives after the abort would stay behind
        self._pending.clear()
        if self._upload is not None:
            place = self._store.place(self._key)
            with contextlib.suppress(StorageError):
                self._store.abort_upload(place, self._upload, ABORT_PATIENCE_S)

    def _send(self) -> None:
        if self._upload is None:
            self._upload = self._store.begin_upload(self._key)
        while len(self._pending) >= UPLOADS_IN_FLIGHT:
            self._parts.append(self._pending.popleft().result())
        self._num_parts += 1
        part, self._part = self._part, io.BytesIO()
        self._pending.append(
            self._store.pool.submit(
                self._store.upload_part, self._key, self._upload, self._num_parts, part
            )
        )

    def __enter__(self) -> MultipartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
