"""A fast S3-like server that takes what is written without keeping it, for tests of memory.

The buckets of a folder are served for reading, see `tests.servers.static`; the bucket `out` may be
written, too. There small objects are kept in memory; of those uploaded in parts only size and
SHA-256 are, which `GET /out/KEY?sha256` answers. One process can so merge more than the machine
could hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import urlopen
from xml.sax.saxutils import escape

from tests.servers.processes import running, wait_for_line
from tests.servers.static import REASONS, Files, listing
from tests.servers.wire import Head, Wire, listen, serve

BUCKET = "out"


@dataclass(frozen=True)
class Sink:
    """A running server."""

    endpoint: str

    def get(self, key: str) -> bytes:
        """Return an object of the bucket `out` that was written at once."""
        with urlopen(f"{self.endpoint}/{BUCKET}/{key}") as answer:
            data: bytes = answer.read()
        return data

    def described(self, key: str) -> tuple[int, str]:
        """Return size and SHA-256 of an object of the bucket `out`."""
        with urlopen(f"{self.endpoint}/{BUCKET}/{key}?sha256") as answer:
            size_bytes, sha256 = json.load(answer)
        return size_bytes, sha256


@contextmanager
def sink_server(folder: Path) -> Iterator[Sink]:
    """Serve the buckets of `folder`, and the writable one, on a free port of this machine."""
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "sink.log"
        command = [sys.executable, "-m", "tests.servers.sink", str(folder.resolve())]
        with running(command, log) as process:
            yield Sink(wait_for_line(process, log, r"Serving on (http://[\d.]+:\d+)\n")[1])


@dataclass
class Stored:
    """An object; without its bytes where it came in parts."""

    size_bytes: int
    sha256: str
    data: bytes | None = None
    date: str = field(default_factory=lambda: formatdate(usegmt=True))

    @property
    def etag(self) -> str:
        """What tells its content from every other."""
        return f'"{self.sha256[:32]}"'


@dataclass
class Upload:
    """Parts, hashed in their order; one that comes too early waits."""

    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size_bytes: int = 0
    next_number: int = 1
    early: dict[int, bytearray] = field(default_factory=dict)

    def take(self, number: int, body: bytearray) -> None:
        """Take a part; the second of the same number must be the same, and is forgotten."""
        if number < self.next_number:
            return
        self.early[number] = body
        while (part := self.early.pop(self.next_number, None)) is not None:
            self.digest.update(part)
            self.size_bytes += len(part)
            self.next_number += 1


class Objects(Files):
    """Answers requests for the writable bucket; those for others like `Files`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, delay_s=0)
        self._objects: dict[str, Stored] = {}
        self._uploads: dict[str, Upload] = {}
        self._numbers = itertools.count()

    async def connection(self, client: Wire) -> None:
        """Serve one connection."""
        while head := await client.head():
            url = urlsplit(head.target)
            bucket, _, key = unquote(url.path).strip("/").partition("/")
            if head.headers.get("expect"):
                await client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = bytearray()
            async for piece, is_content in client.body(head.request_framing()):
                if is_content:
                    body += piece
            if bucket == BUCKET:
                await client.send(
                    self._respond(head, key, parse_qs(url.query, keep_blank_values=True), body)
                )
            else:
                await self.answer(client, head)
            if head.closes:
                return

    def _respond(self, head: Head, key: str, query: dict[str, list[str]], body: bytearray) -> bytes:
        if not key:
            return _xml(
                "<ListMultipartUploadsResult/>" if "uploads" in query else self._list(query)
            )
        if "uploads" in query or "uploadId" in query:
            return self._upload(head.method, key, query, body)
        if head.method == "PUT":
            return self._put(key, bytes(body), head.headers)
        return self._look(head, key, digest_only="sha256" in query)

    def _look(self, head: Head, key: str, *, digest_only: bool) -> bytes:
        if head.method == "DELETE":
            self._objects.pop(key, None)
            return _response(204)
        found = self._objects.get(key)
        if found is None:
            return _error(404, "NoSuchKey", head)
        more = [f"ETag: {found.etag}", f"Last-Modified: {found.date}"]
        if digest_only:
            return _response(200, json.dumps([found.size_bytes, found.sha256]).encode())
        if head.method == "HEAD":
            return _response(200, length=found.size_bytes, more=more)
        assert found.data is not None, f"{key} came in parts, which were not kept"
        return _response(200, found.data, more=more)

    def _put(self, key: str, body: bytes, headers: dict[str, str]) -> bytes:
        found = self._objects.get(key)
        wanted = headers.get("if-match")
        if (headers.get("if-none-match") and found) or (
            wanted and (found is None or wanted != found.etag)
        ):
            return _error(412, "PreconditionFailed")
        self._objects[key] = Stored(len(body), hashlib.sha256(body).hexdigest(), body)
        return _response(200, more=[f"ETag: {self._objects[key].etag}"])

    def _upload(self, method: str, key: str, query: dict[str, list[str]], body: bytearray) -> bytes:
        if "uploads" in query:
            name = str(next(self._numbers))
            self._uploads[name] = Upload()
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key>"
                f"<UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            )
        (name,) = query["uploadId"]
        if name not in self._uploads:
            return _error(404, "NoSuchUpload")
        if method == "PUT":
            (number,) = query["partNumber"]
            self._uploads[name].take(int(number), body)
            return _response(200, more=[f'ETag: "part-{number}"'])
        upload = self._uploads.pop(name)
        if method == "DELETE":
            return _response(204)
        if upload.early:
            return _error(400, "InvalidPart")
        stored = Stored(upload.size_bytes, upload.digest.hexdigest())
        self._objects[key] = stored
        return _xml(
            f"<CompleteMultipartUploadResult><Key>{escape(key)}</Key>"
            f"<ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>"
        )

    def _list(self, query: dict[str, list[str]]) -> str:
        prefix, delimiter = (query.get(k, [""])[0] for k in ("prefix", "delimiter"))
        objects = {key: (o.size_bytes, o.etag) for key, o in self._objects.items()}
        return listing(BUCKET, objects, prefix, delimiter)


def _response(
    status: int, body: bytes = b"", *, length: int | None = None, more: list[str] | None = None
) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        f"Content-Length: {len(body) if length is None else length}",
        f"Date: {formatdate(usegmt=True)}",
        *(more or []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _xml(body: str) -> bytes:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'
    return _response(200, text.encode(), more=["Content-Type: application/xml"])


def _error(status: int, code: str, request: Head | None = None) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return _response(status, b"" if request is not None and request.method == "HEAD" else body)


async def _main(folder: Path) -> None:
    listener = listen("127.0.0.1")
    print(f"Serving on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await serve(listener, Objects(folder).connection)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
