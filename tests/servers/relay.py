"""The proxy's process: pass HTTP exchanges on, with the faults that a plan asks for.

Started by `tests.servers.proxy`. Commands come as JSON lines on standard input, answers go to
standard output; the process ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from typing import Any

from tests.servers.faults import Plan, Referee, Verdict
from tests.servers.wire import LAST_INTERIM_STATUS, PIECE_BYTES, Head, Wire, listen, serve

BODY_FAULTS = ("reset_body", "close_body", "shorten", "flip_response")
CUTTING = ("reset_body", "close_body", "shorten")
REFUSALS = {
    "internal_error": (
        "500 Internal Server Error",
        "InternalError",
        "We encountered an internal error. Please try again.",
    ),
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "forbidden": (
        "403 Forbidden",
        "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
    ),
    "not_implemented": (
        "501 Not Implemented",
        "NotImplemented",
        "A header you provided implies functionality that is not implemented.",
    ),
    "not_allowed": (
        "405 Method Not Allowed",
        "MethodNotAllowed",
        "The specified method is not allowed against this resource.",
    ),
    "not_found": ("404 Not Found", "", ""),
    "bad_request": ("400 Bad Request", "InvalidArgument", "Unsupported header or parameter."),
    "error_under_200": ("200 OK", "InternalError", "We encountered an internal error."),
    "babble": ("200 OK", "", ""),
}


class Pace:
    """Bounds the rate of a flow."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        # A twentieth of a second at a time keeps a slow flow smooth.
        self.piece_bytes = min(PIECE_BYTES, max(1, int((bytes_per_s or 1e12) / 20)))
        self._due_s = asyncio.get_running_loop().time()

    async def passed(self, num_bytes: int) -> None:
        """Wait until so many more bytes may have passed."""
        if self._rate is not None:
            self._due_s += num_bytes / self._rate
            await asyncio.sleep(self._due_s - asyncio.get_running_loop().time())


class Relay:
    """Serves clients from one upstream server, and remembers every request."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._referee = Referee(Plan())
        # Of each request: method, target, range, status (0: none was sent), fault, delay in s.
        self.seen: list[list[Any]] = []
        self._num_in_flight = 0
        self.peak_in_flight = 0

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command and return the answer."""
        if "plan" in request:
            self._referee = Referee(Plan.from_mapping(request["plan"]))
        if request.get("forget"):
            self.seen = []
            self.peak_in_flight = self._num_in_flight
        if not request.get("report"):
            return {}
        return {"seen": self.seen, "peak_in_flight": self.peak_in_flight}

    async def connection(self, client: Wire) -> None:
        """Serve one client's connection, each over an upstream connection of its own."""
        upstream: Wire | None = None
        try:
            while head := await client.head():
                if upstream is not None and upstream.is_stale():
                    upstream.close()
                    upstream = None
                if upstream is None:
                    upstream = await self._connect()
                self._num_in_flight += 1
                self.peak_in_flight = max(self.peak_in_flight, self._num_in_flight)
                try:
                    goes_on = await self._exchange(client, upstream, head)
                finally:
                    self._num_in_flight -= 1
                if not goes_on:
                    return
        finally:
            if upstream is not None:
                upstream.close()

    async def _connect(self) -> Wire:
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._upstream)
        except OSError:
            sock.close()
            raise
        return Wire(sock)

    async def _exchange(self, client: Wire, upstream: Wire, head: Head) -> bool:
        """Pass one request and its response; return whether the client's connection goes on."""
        verdict = self._referee.judge(head)
        note = [head.method, head.target, head.headers.get("range", ""), 0, "", verdict.delay_s]
        self.seen.append(note)
        await asyncio.sleep(verdict.delay_s)
        if verdict.fault in REFUSALS or verdict.fault in ("reset", "freeze"):
            note[4] = verdict.fault
            return await _refuse(client, head, verdict.fault, note)
        if verdict.rewrites:
            head = verdict.rewritten(head)
        sending = asyncio.create_task(_send_request(client, upstream, head, verdict, note))
        try:
            response = await upstream.head()
            while response is not None and response.status <= LAST_INTERIM_STATUS:
                await client.send(response.raw)
                response = await upstream.head()
            if response is None:
                return False
            if verdict.fault == "lost_response":
                note[4] = verdict.fault
                await upstream.discard(response.response_framing(head.method))
                client.reset()
                return False
            if verdict.rewrites:
                response = verdict.rewritten(response)
            note[3] = response.status
            goes_on = await _send_response(client, upstream, head, response, verdict, note)
            # A server may refuse a body without reading it; such a connection cannot go on.
            return goes_on and sending.done() and not head.closes and not response.closes
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _refuse(client: Wire, head: Head, fault: str, note: list[Any]) -> bool:
    """Answer in the server's stead, or not at all."""
    if fault == "reset":
        client.reset()
        return False
    expects = "expect" in head.headers  # then the client keeps the body back
    if not expects:
        await client.discard(head.request_framing())
    if fault == "freeze":
        await client.head()  # until the client gives up
        return False
    status, code, message = REFUSALS[fault]
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{_echo(head)}</Error>"
    )
    if fault == "babble":
        body = "<!DOCTYPE html><p>It works & that is all.<br></html>"
    elif not code:
        body = ""
    ends = expects or head.closes
    start = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {'close' if ends else 'keep-alive'}\r\n\r\n"
    )
    note[3] = int(status[:3])
    await client.send((start + (body if head.method != "HEAD" else "")).encode())
    return not ends


def _echo(head: Head) -> str:
    """Return what AWS says of the credentials of a request that it refuses."""
    key = re.search(r"Credential=([^/]+)/", head.headers.get("authorization", ""))
    token = head.headers.get("x-amz-security-token", "")
    return (
        f"<AWSAccessKeyId>{key[1]}</AWSAccessKeyId><CanonicalRequest>{token}</CanonicalRequest>"
        if key
        else ""
    )


async def _send_request(
    client: Wire, upstream: Wire, head: Head, verdict: Verdict, note: list[Any]
) -> None:
    pace = Pace(verdict.bytes_per_s)
    framing = head.request_framing()
    await upstream.send(head.raw)
    flip_at = -1
    if verdict.fault == "flip_request":
        flip_at = verdict.rng.randrange(framing) if framing > 0 else 0
    is_aws_chunked = head.headers.get("x-amz-content-sha256", "").startswith("STREAMING")
    position = 0
    pieces = client.body(framing, pace.piece_bytes)
    while True:
        try:
            piece, is_content = await anext(pieces)
        except StopAsyncIteration:
            return
        except ConnectionError:
            upstream.hang_up()  # or the server would wait for the rest, and we for its answer
            raise
        if is_content:
            if is_aws_chunked and flip_at >= 0 and position == 0:
                # The content begins after the first line of its own framing.
                flip_at = bytes(piece).find(b"\r\n") + 2
            if position <= flip_at < position + len(piece):
                piece[flip_at - position] ^= 0x55
                note[4] = "flip_request"
            position += len(piece)
        await upstream.send(piece)
        await pace.passed(len(piece))


async def _send_response(
    client: Wire, upstream: Wire, request: Head, response: Head, verdict: Verdict, note: list[Any]
) -> bool:
    """Pass a response; return whether both connections can go on."""
    framing = response.response_framing(request.method)
    fault = verdict.fault if framing > 0 and response.status in (200, 206) else None
    flip_at = cut_at = -1
    if fault in BODY_FAULTS:
        note[4] = fault
    if fault == "flip_response":
        flip_at = verdict.rng.randrange(framing)
    elif fault in CUTTING:
        cut_at = framing // 2
    await client.send((response.with_length(cut_at) if fault == "shorten" else response).raw)
    pace = Pace(verdict.bytes_per_s)
    position = 0
    async for piece, _ in upstream.body(framing, pace.piece_bytes):
        if position <= flip_at < position + len(piece):
            piece[flip_at - position] ^= 0x55
        # After the cut of a shortened body the rest is read and dropped: no second fault.
        await client.send(piece if cut_at < 0 else piece[: max(0, cut_at - position)])
        position += len(piece)
        if fault in ("reset_body", "close_body") and position >= cut_at:
            if fault == "reset_body":
                client.reset()
            return False
        await pace.passed(len(piece))
    return framing >= -1


async def _main(upstream: tuple[str, int], host: str) -> None:
    relay = Relay(upstream)
    listener = listen(host)
    serving = asyncio.create_task(serve(listener, relay.connection))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        print(json.dumps(relay.command(json.loads(line))), flush=True)
    serving.cancel()


if __name__ == "__main__":
    asyncio.run(_main((sys.argv[1], int(sys.argv[2])), sys.argv[3]))
