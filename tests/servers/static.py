"""A fast S3-like server of the files in a folder, for benchmarks of reading.

Path style: `/bucket/key` is the file `folder/bucket/key`. It serves GET (whole or one range),
HEAD and ListObjectsV2 (all keys in one page), looks at no signature, and sends files with
sendfile, so that a benchmark measures the client.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.servers.processes import running, wait_for_line
from tests.servers.wire import Head, Wire, listen, serve

REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
}


@contextmanager
def static_server(folder: Path, *, delay_s: float = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve `folder` on a free port of `host`, each answer `delay_s` late; yield the endpoint."""
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "static.log"
        here = [sys.executable, "-m", "tests.servers.static"]
        with running([*here, str(folder.resolve()), str(delay_s), host], log) as process:
            yield wait_for_line(process, log, r"Serving on (http://[\d.]+:\d+)\n")[1]


def etag(path: Path) -> str:
    """Return an ETag that stays while the file does."""
    status = path.stat()
    identity = f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    return f'"{hashlib.md5(identity.encode()).hexdigest()}"'


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the half-open range that a Range header asks for; None if there is none such."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    return (start, stop) if start < stop else None


def listing(
    bucket: str, objects: Mapping[str, tuple[int, str]], prefix: str, delimiter: str
) -> str:
    """Return ListObjectsV2's answer for objects by key, each with its size and ETag."""
    contents = []
    folders = []
    for key, (size, tag) in sorted(objects.items()):
        if not key.startswith(prefix):
            continue
        head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        if found:
            folders.append(prefix + head + found)
            continue
        contents.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{escape(tag)}</ETag>"
            f"<LastModified>2000-01-01T00:00:00.000Z</LastModified></Contents>"
        )
    common = "".join(
        f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>"
        for f in dict.fromkeys(folders)
    )
    return (
        f"<ListBucketResult><Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<KeyCount>{len(contents)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(contents)}{common}</ListBucketResult>"
    )


def files_in(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and ETag of every file below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, etag(p)) for p in files}


class Files:
    """Answers requests from a folder."""

    def __init__(self, folder: Path, delay_s: float) -> None:
        self._folder = folder
        self._delay_s = delay_s

    async def connection(self, client: Wire) -> None:
        """Serve one connection."""
        while head := await client.head():
            await client.discard(head.request_framing())
            await asyncio.sleep(self._delay_s)
            await self.answer(client, head)
            if head.closes:
                return

    async def answer(self, client: Wire, head: Head) -> None:
        """Answer one request, whose body was read."""
        url = urlsplit(head.target)
        path = self._folder / unquote(url.path).strip("/")
        query = parse_qs(url.query)
        if head.method not in ("GET", "HEAD"):
            await _send(client, head, 405, _error("MethodNotAllowed"))
        elif not path.resolve().is_relative_to(self._folder):
            await _send(client, head, 404, _error("NoSuchKey"))
        elif path.is_dir() and path.parent == self._folder:
            prefix, delimiter = (query.get(k, [""])[0] for k in ("prefix", "delimiter"))
            xml = listing(path.name, files_in(path), prefix, delimiter)
            await _send(client, head, 200, xml)
        elif not path.is_file():
            await _send(client, head, 404, _error("NoSuchKey"))
        elif head.headers.get("if-match", etag(path)) != etag(path):
            await _send(client, head, 412, _error("PreconditionFailed"))
        else:
            await _send_file(client, head, path)


def _error(code: str) -> str:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"


async def _send(client: Wire, request: Head, status: int, xml: str) -> None:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()
    start = (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    await client.send(start.encode() + (b"" if request.method == "HEAD" else body))


async def _send_file(client: Wire, request: Head, path: Path) -> None:
    with path.open("rb") as file:
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        more = ""
        if wanted := request.headers.get("range"):
            found = byte_range(wanted, size)
            if found is None:
                await _send(client, request, 416, _error("InvalidRange"))
                return
            (start, stop), status = found, 206
            more = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {stop - start}\r\nAccept-Ranges: bytes\r\nETag: {etag(path)}\r\n"
            f"Last-Modified: {formatdate(path.stat().st_mtime, usegmt=True)}\r\n{more}\r\n"
        )
        await client.send(head.encode())
        if request.method == "GET" and start < stop:
            loop = asyncio.get_running_loop()
            await loop.sock_sendfile(client.sock, file, start, stop - start)


async def _main(folder: Path, delay_s: float, host: str) -> None:
    listener = listen(host)
    print(f"Serving on http://{host}:{listener.getsockname()[1]}", flush=True)
    await serve(listener, Files(folder, delay_s).connection)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
