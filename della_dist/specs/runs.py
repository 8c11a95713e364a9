"""Rows as runs of consecutive rows of other tensors: what is moved is mostly moved together."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from operator import add, sub


@dataclass(frozen=True, slots=True)
class Runs:
    """Which row of which source each row is, from one run to the next.

    Arrays of numbers, for there may be a run for every row, and every worker gets them.
    """

    num_rows: int
    starts: array[int]
    """The first row of each run, ascending, beginning with 0."""
    sources: array[int]
    """The source of each run; -1: zeros."""
    firsts: array[int]
    """Its first row in that source."""

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]]) -> Runs:
        """Return the runs of rows that are given one by one, as (source, row in it)."""
        starts, sources, firsts = array("i"), array("i"), array("i")
        expected = (-2, 0)
        number = -1
        for number, (source, row) in enumerate(rows):
            if (source, row) != expected:
                starts.append(number)
                sources.append(source)
                firsts.append(row)
            expected = (source, row + 1)
        return cls(number + 1, starts, sources, firsts)

    def joined(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (source, first row in it, end) of what some rows are, as few ranges as there are.

        Sources come one after another, their ranges ascending; those without rows (-1) are left
        out. Where every row is a run of its own, this takes a fraction of `within`.
        """
        low = bisect_right(self.starts, start) - 1
        high = bisect_left(self.starts, stop)
        sources = self.sources[low:high]
        edges = [start, *self.starts[low + 1 : high], stop]
        firsts = [self.firsts[low] + start - self.starts[low], *self.firsts[low + 1 : high]]
        lasts = list(map(add, firsts, map(sub, edges[1:], edges)))
        for number in sorted(set(sources)):
            if number < 0:
                continue
            mine = [one == number for one in sources]
            ranges = sorted(zip(compress(firsts, mine), compress(lasts, mine), strict=True))
            first, last = ranges[0]
            for begin, end in ranges:
                if begin > last:
                    yield number, first, last
                    first = begin
                last = max(last, end)
            yield number, first, last

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first row, how many, source, first row in it) of the runs of some rows."""
        i = bisect_right(self.starts, start) - 1
        while start < stop:
            end = self.starts[i + 1] if i + 1 < len(self.starts) else self.num_rows
            count = min(stop, end) - start
            yield start, count, self.sources[i], self.firsts[i] + start - self.starts[i]
            start += count
            i += 1
