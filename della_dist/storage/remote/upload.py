"""Writing one object of S3 as a stream: multipart, several parts at once, bounded memory."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from della_dist.errors import OutputError, StorageError
from della_dist.storage.remote.retry import error_code, is_unknown_to_store, retry
from della_dist.storage.store import Bytes, ObjectStat, as_bytes

#: Of a part: at least 5 MiB, but for the last; all the same, which R2 wants.
MIN_PART_BYTES = 8 << 20
MAX_PARTS = 10_000
#: Parts of one object that are on their way at once, beyond the one that is being filled.
UPLOADS_IN_FLIGHT = 2
#: An upload that stays behind is cleared away at the end of the run, or by the next.
ABORT_PATIENCE_S = 10.0


class UploadStore(Protocol):
    """What an upload needs of its store: requests of S3, once or again where that may help."""

    @property
    def location(self) -> str:
        """The URL of the root."""

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that make requests."""

    def describe(self, key: str) -> str:
        """Return the URL of `key`."""

    def place(self, key: str) -> dict[str, str]:
        """Return bucket and name of `key`, as requests have them."""

    def call(self, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Make one request, once."""

    def retried(self, key: str, doing: str, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Make a request about `key`, again where a failure may pass."""

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once."""


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

    def __init__(
        self, store: UploadStore, key: str, size_bytes: int | None, part_size: int
    ) -> None:
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
            stat = finish_upload(
                self._store, self._key, self._upload, self._parts, self.num_written
            )
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
                abort_upload(self._store, place, self._upload, ABORT_PATIENCE_S)

    def _send(self) -> None:
        if self._upload is None:
            self._upload = begin_upload(self._store, self._key)
        while len(self._pending) >= UPLOADS_IN_FLIGHT:
            self._parts.append(self._pending.popleft().result())
        self._num_parts += 1
        part, self._part = self._part, io.BytesIO()
        self._pending.append(
            self._store.pool.submit(
                upload_part, self._store, self._key, self._upload, self._num_parts, part
            )
        )

    def __enter__(self) -> MultipartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def begin_upload(store: UploadStore, key: str) -> str:
    """Begin a multipart upload and return its id."""
    try:
        answer = store.retried(key, "writing", "create_multipart_upload")
    except StorageError as error:
        if not is_unknown_to_store(error):
            raise
        raise _no_uploads(store, key, str(error.__cause__ or error)) from error
    if "UploadId" not in answer:
        raise _no_uploads(store, key, "it named no upload when it was asked to begin one.")
    return str(answer["UploadId"])


def upload_part(
    store: UploadStore, key: str, upload: str, number: int, data: io.BytesIO
) -> dict[str, Any]:
    """Send one part and return what the completion has to say of it."""
    answer = store.retried(
        key, "writing", "upload_part", UploadId=upload, PartNumber=number, Body=data
    )
    if "ETag" not in answer:
        raise _no_uploads(store, key, "it answered a part without the ETag that completes it.")
    # Where the client sends checksums, completing names them again.
    checksums = {
        name: answer[name]
        for name in answer
        if name.startswith("Checksum") and name != "ChecksumType"
    }
    return {"PartNumber": number, "ETag": answer["ETag"], **checksums}


def finish_upload(
    store: UploadStore, key: str, upload: str, parts: list[dict[str, Any]], size_bytes: int
) -> ObjectStat:
    """Complete an upload: the object appears, all of it at once."""
    place = store.place(key)

    def was_done(error: Exception) -> bool | None:
        # The answer to an earlier request was lost: the upload is gone, the object is there.
        gone = error_code(error) == "NoSuchUpload"
        return (
            True
            if gone and store.exists(key) and store.stat(key).size_bytes == size_bytes
            else None
        )

    def complete() -> bool:
        store.call(
            "complete_multipart_upload",
            **place,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
        )
        return True

    retry(complete, f"writing {store.describe(key)}", on_failure=was_done)
    return store.stat(key)


def abort_upload(
    store: UploadStore, place: dict[str, str], upload: str, patience_s: float | None = None
) -> None:
    """Throw an upload away; one that is gone is fine."""

    def abort() -> None:
        try:
            store.call("abort_multipart_upload", **place, UploadId=upload)
        except FileNotFoundError:
            return

    retry(abort, f"aborting an upload to {store.location}", patience_s=patience_s)


def _no_uploads(store: UploadStore, key: str, how: str) -> OutputError:
    return OutputError(
        f"{store.describe(key)} cannot be written: its store lacks the multipart uploads that "
        f"everything over {MIN_PART_BYTES >> 20} MiB needs ({how.rstrip('.')}). Choose an output "
        "in a store that has them."
    )
