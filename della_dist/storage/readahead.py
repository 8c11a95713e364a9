"""Reading ahead from a remote store: many requests at once, within a budget of bytes.

Whoever reads says what it will read, in order (`ReadAhead.follow`). Neighbouring ranges are joined
to requests of a useful size, and as many are on their way as the budget has room for; the memory of
a range is free for the next as soon as it is released. Ranges that nobody announced are read when
they are asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from della_dist.storage.ranges import coalesce, pieces
from della_dist.storage.store import ObjectStat, U8Array, as_bytes

#: Begins a request that fills a buffer with the bytes of an object from a position on.
Submit = Callable[[int, memoryview], "Future[None]"]


class RemoteReader:
    """Reads ranges of one object of a remote store; see `della_dist.storage.store.Reader`.

    Parameters
    ----------
    stat
        Size and version of the object.
    submit
        Begins a request; it fails where the object is not of that version.
    ahead
        What holds the bytes. Readers may share one.
    """

    __slots__ = ("_ahead", "_closed", "stat", "submit")

    def __init__(self, stat: ObjectStat, submit: Submit, ahead: ReadAhead) -> None:
        self.stat = stat
        self.submit = submit
        self._ahead = ahead
        self._closed = False

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read the bytes from `start` up to `stop`, which a `view` will ask for."""
        if start < stop:
            self._ahead.prefetch(self, start, stop)

    def view(self, start: int, stop: int) -> U8Array:
        """Return the bytes from `start` up to `stop`, shape (stop - start,), read-only."""
        if self._closed:
            raise ValueError("the reader is closed")
        if not 0 <= start <= stop <= self.stat.size_bytes:
            raise ValueError(f"[{start}, {stop}) is not within {self.stat.size_bytes} bytes")
        return self._ahead.view(self, start, stop) if start < stop else _EMPTY

    def release(self, start: int, stop: int) -> None:
        """Let go of the memory of a range that was viewed."""
        if start < stop:
            self._ahead.release(self, start, stop)

    def close(self) -> None:
        """Let go of the object."""
        self._closed = True

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_EMPTY = np.empty(0, np.uint8)
_EMPTY.flags.writeable = False

#: A range that will be read: of which object, from, to.
Want = tuple[RemoteReader, int, int]


@dataclass(eq=False, slots=True)
class _Segment:
    """Bytes that are read together, and given back together."""

    reader: RemoteReader
    start: int
    stop: int
    uses: int
    """Announced ranges in it that were not released yet."""
    buffer: U8Array | None = None
    """None until its requests are made, and again when its last use is over."""
    requests: list[Future[None]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


class ReadAhead:
    """Buffers of what is being read. Safe to use from several threads.

    Parameters
    ----------
    request_bytes
        Of one request at most.
    budget_bytes
        Of all buffers together; None leaves the bound to whoever prefetches. What is waited for is
        read even beyond it: one block's ranges may need more.
    """

    def __init__(self, request_bytes: int, budget_bytes: int | None = None) -> None:
        self._request_bytes = request_bytes
        self._budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self._plan: Iterator[Sequence[Want]] = iter(())
        self._queue: deque[_Segment] = deque()
        self._planned: dict[Want, deque[_Segment]] = {}
        self._live_bytes = 0
        self._closed = False

    def follow(self, plan: Iterator[Sequence[Want]]) -> None:
        """Read ahead along `plan`: groups of ranges, in the order of their use.

        `plan` is drawn from as far as the budget reaches, by whichever thread makes room.
        """
        with self._lock:
            self._plan = plan
            self._admit()

    def prefetch(self, reader: RemoteReader, start: int, stop: int) -> None:
        """Make sure that a range is on its way, or will be when there is room."""
        want = (reader, start, stop)
        with self._lock:
            while want not in self._planned and self._draw():
                pass
            if want not in self._planned:
                segment = _Segment(reader, start, stop, uses=1)
                self._planned[want] = deque([segment])
                self._queue.appendleft(segment)
            self._admit()

    def view(self, reader: RemoteReader, start: int, stop: int) -> U8Array:
        """Wait for a range and return it, read-only."""
        self.prefetch(reader, start, stop)
        with self._lock:
            segment = self._planned[reader, start, stop][0]
            if segment.buffer is None:
                if self._closed:
                    raise ValueError("reading was stopped")
                self._queue.remove(segment)  # it alone: what is before it waits for its turn
                self._request(segment)
            buffer = segment.buffer
        assert buffer is not None
        for request in segment.requests:
            request.result()
        view = buffer[start - segment.start : stop - segment.start]
        view.flags.writeable = False
        return view

    def release(self, reader: RemoteReader, start: int, stop: int) -> None:
        """Say that one use of a range is over."""
        want = (reader, start, stop)
        with self._lock:
            segments = self._planned.get(want)
            if segments is None:
                return
            segment = segments.popleft()
            if not segments:
                del self._planned[want]
            segment.uses -= 1
            if segment.uses == 0 and segment.buffer is not None:
                segment.buffer = None
                self._live_bytes -= segment.size_bytes
            self._admit()

    def close(self) -> None:
        """Stop reading: requests that did not begin yet are not made."""
        with self._lock:
            self._plan = iter(())
            self._queue.clear()
            self._closed = True
            for segments in self._planned.values():
                for segment in segments:
                    for request in segment.requests:
                        request.cancel()

    def is_closed(self) -> bool:
        """Return whether nobody reads any more."""
        return self._closed

    def _admit(self) -> None:
        """Make requests as far as the budget goes."""
        while not self._closed and (self._queue or self._draw()):
            size_bytes = self._queue[0].size_bytes
            budget = self._budget_bytes
            if budget is not None and self._live_bytes and self._live_bytes + size_bytes > budget:
                return
            self._request(self._queue.popleft())

    def _draw(self) -> bool:
        """Take the next stretch of the plan; return whether there was one."""
        window_bytes = (self._budget_bytes or 0) // 2
        wants: list[Want] = []
        drawn_bytes = 0
        while drawn_bytes < max(1, window_bytes):
            group = next(self._plan, None)
            if group is None:
                break
            wants += group
            drawn_bytes += sum(stop - start for _, start, stop in group)
        by_reader: dict[RemoteReader, list[int]] = {}
        for i, (reader, start, stop) in enumerate(wants):
            if start < stop:
                by_reader.setdefault(reader, []).append(i)
        spans = []
        # Every object gets its share of the window, so that its first bytes come first.
        span_bytes = min(self._request_bytes, window_bytes // max(1, len(by_reader)))
        for reader, mine in by_reader.items():
            for span in coalesce([wants[i][1:] for i in mine], span_bytes):
                members = [mine[i] for i in span.members]
                spans.append((members[0], reader, span.start, span.stop, members))
        for _, reader, start, stop, members in sorted(spans, key=lambda span: span[0]):
            self._enqueue(reader, start, stop, [wants[i] for i in members])
        return bool(wants)

    def _enqueue(self, reader: RemoteReader, start: int, stop: int, wants: Sequence[Want]) -> None:
        segment = _Segment(reader, start, stop, uses=len(wants))
        self._queue.append(segment)
        for want in wants:
            self._planned.setdefault(want, deque()).append(segment)

    def _request(self, segment: _Segment) -> None:
        """Make the requests for a segment."""
        segment.buffer = buffer = np.empty(segment.size_bytes, np.uint8)
        self._live_bytes += segment.size_bytes
        for first, last in pieces(segment.start, segment.stop, self._request_bytes):
            into = as_bytes(buffer)[first - segment.start : last - segment.start]
            segment.requests.append(segment.reader.submit(first, into))
