"""Which requests read a number of byte ranges: pure planning, the result is what is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Bytes that are read and thrown away rather than asked around: about what a request's latency
#: costs on one connection is a megabyte or more, but neighbours in a checkpoint have no gaps.
MAX_GAP_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that are read together."""

    start: int
    stop: int
    members: tuple[int, ...]
    """Positions of the ranges it holds, ascending."""


def coalesce(ranges: Sequence[tuple[int, int]], max_bytes: int) -> list[Span]:
    """Return the spans that hold `ranges`, in the order in which their first members are used.

    Neighbours are joined, whatever their order, as long as the span stays within `max_bytes`; a
    range that is larger is a span of its own.

    Parameters
    ----------
    ranges
        (start, stop) of each, of one object, in order of use. Of those that overlap, but are not
        equal, some bytes may be in two spans: tensors of old files may share them.
    max_bytes
        Of a span of several ranges.
    """
    spans: list[Span] = []
    start = stop = 0
    members: list[int] = []

    def close() -> None:
        if members:
            spans.append(Span(start, stop, tuple(sorted(members))))

    for i in sorted(range(len(ranges)), key=lambda i: (ranges[i], i)):
        first, last = ranges[i]
        fits = first - stop <= MAX_GAP_BYTES and last - start <= max_bytes
        if members and (fits or last <= stop):
            stop = max(stop, last)
            members.append(i)
        else:
            close()
            start, stop, members = first, last, [i]
    close()
    return sorted(spans, key=lambda span: span.members[0])


def pieces(start: int, stop: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut a span into requests of about equal size, at most `max_bytes` each."""
    count = max(1, -(-(stop - start) // max_bytes))
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    yield from pairwise(edges)
