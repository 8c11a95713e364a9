"""HTTP/1.1 over non-blocking sockets, as little of it as a proxy and a file server need.

asyncio's streams copy every byte twice more and have no say in how a connection ends, so these
servers work on the sockets themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property

PIECE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
CHUNKED = -1
UNTIL_CLOSE = -2
LAST_INTERIM_STATUS = 199
BODILESS = (204, 304)


@dataclass(frozen=True)
class Head:
    """A request's or a response's first line and headers, with the empty line that ends them."""

    raw: bytes

    @cached_property
    def text(self) -> str:
        """The whole head."""
        return self.raw.decode("latin-1")

    @cached_property
    def headers(self) -> dict[str, str]:
        """The headers by lower-case name."""
        lines = (line.partition(":") for line in self.text.split("\r\n")[1:])
        return {name.strip().lower(): value.strip() for name, _, value in lines if name}

    @property
    def method(self) -> str:
        """A request's method."""
        return self.text.split(" ", 1)[0]

    @property
    def target(self) -> str:
        """A request's path and query."""
        return self.text.split(" ", 2)[1]

    @property
    def status(self) -> int:
        """A response's status."""
        return int(self.text.split(" ", 2)[1][:3])

    @property
    def closes(self) -> bool:
        """Whether the connection ends after this exchange."""
        first, _, _ = self.text.partition("\r\n")
        return "HTTP/1.0" in first or self.headers.get("connection", "").lower() == "close"

    def with_length(self, length: int) -> Head:
        """Return this head with another Content-Length."""
        header = b"\r\nContent-Length: %d\r\n" % length
        return Head(re.sub(rb"(?i)\r\ncontent-length:[^\r]*\r\n", header, self.raw, count=1))

    def request_framing(self) -> int:
        """Return the length of a request's body, or CHUNKED."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return CHUNKED
        return int(self.headers.get("content-length", 0))

    def response_framing(self, method: str) -> int:
        """Return the length of a response's body, or CHUNKED, or UNTIL_CLOSE."""
        if method == "HEAD" or self.status in BODILESS:
            return 0
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return CHUNKED
        return int(self.headers.get("content-length", UNTIL_CLOSE))


class Wire:
    """A connected socket, and what was read from it beyond the last head."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._ahead = bytearray()
        self._buffer = memoryview(bytearray())
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`."""
        await self._loop.sock_sendall(self.sock, data)

    async def _read_until(self, end: bytes, most: int) -> bytes:
        while (found := self._ahead.find(end)) < 0:
            more = await self._loop.sock_recv(self.sock, 64 * 1024)
            if not more and not self._ahead:
                return b""
            if not more or len(self._ahead) > most:
                raise ConnectionError("the peer sent no whole line or head")
            self._ahead += more
        size = found + len(end)
        taken = bytes(self._ahead[:size])
        del self._ahead[:size]
        return taken

    async def head(self) -> Head | None:
        """Read a head; None where the peer ended the connection instead."""
        raw = await self._read_until(b"\r\n\r\n", MAX_HEAD_BYTES)
        return Head(raw) if raw else None

    async def _some(self, most: int) -> memoryview:
        """Read up to `most` bytes into a buffer that the next call overwrites; empty at the end."""
        if self._ahead:
            taken = self._ahead[:most]
            del self._ahead[:most]
            return memoryview(taken)
        if len(self._buffer) < most:
            self._buffer = memoryview(bytearray(most))
        got = await self._loop.sock_recv_into(self.sock, self._buffer[:most])
        return self._buffer[:got]

    async def _exactly(self, length: int, most: int) -> AsyncIterator[memoryview]:
        while length:
            piece = await self._some(min(length, most))
            if not piece:
                raise ConnectionError(f"the peer ended {length} bytes early")
            length -= len(piece)
            yield piece

    async def body(
        self, framing: int, most: int = PIECE_BYTES
    ) -> AsyncIterator[tuple[memoryview, bool]]:
        """Read a body in pieces; with each, whether it is content (else it is chunk framing).

        A piece is good, and may be written to, until the next one is asked for.
        """
        if framing == UNTIL_CLOSE:
            while piece := await self._some(most):
                yield piece, True
        elif framing != CHUNKED:
            async for piece in self._exactly(framing, most):
                yield piece, True
        else:
            size = -1
            while size:
                line = await self._read_until(b"\r\n", MAX_HEAD_BYTES)
                size = int(line.split(b";")[0], 16)
                yield memoryview(line), False
                async for piece in self._exactly(size, most):
                    yield piece, True
                if size:
                    yield memoryview(await self._read_until(b"\r\n", 2)), False
            trailer = b""
            while trailer != b"\r\n":
                trailer = await self._read_until(b"\r\n", MAX_HEAD_BYTES)
                yield memoryview(trailer), False

    async def discard(self, framing: int) -> None:
        """Read a body and forget it."""
        async for _ in self.body(framing):
            pass

    def is_stale(self) -> bool:
        """Whether the peer ended this connection while it was idle."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def hang_up(self) -> None:
        """End both directions and let whoever reads this wire see it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close with a RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close in order; nothing after a `reset`."""
        self.sock.close()


def listen(host: str, port: int = 0) -> socket.socket:
    """Return a non-blocking listening socket."""
    sock = socket.create_server((host, port), backlog=1024)
    sock.setblocking(False)
    return sock


async def serve(listener: socket.socket, handle: Callable[[Wire], Awaitable[None]]) -> None:
    """Give each connection to `handle` in its own task; an ended connection is no error."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def one(wire: Wire) -> None:
        try:
            await handle(wire)
        except OSError:
            pass
        finally:
            wire.close()

    while True:
        sock, _ = await loop.sock_accept(listener)
        task = asyncio.create_task(one(Wire(sock)))
        tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(tasks.discard)
