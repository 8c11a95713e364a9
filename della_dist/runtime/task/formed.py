"""The columns of one block that no file has as they are: gathered of rows, changed by adapters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from della_dist.ops.forming import add_lengthened, add_low_rank, converted, formed, mean
from della_dist.specs.dtypes import itemsize
from della_dist.specs.reading import Segment, segments
from della_dist.specs.sources import (
    Adapted,
    Column,
    Dora,
    Key,
    LowRank,
    Mean,
    MeanRow,
    Rows,
    Stored,
)
from della_dist.storage.store import U8Array

#: What all blocks share, by its key: bytes of rows, arrays of factors and lengths.
Shared: TypeAlias = Mapping[Key, Any]

#: Elements that are converted at once: a few MiB of float64.
_CONVERTED_ELEMENTS = 16 << 10

#: Runs in a block from which on rows are gathered all at once.
_MANY_RUNS = 16


class FormedBlock:
    """What one block has read, and the columns that are formed of it."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._starts: dict[Key, list[int]] = {}
        self._views: dict[Key, list[U8Array]] = {}

    def add(self, stored: Stored, start: int, view: U8Array) -> None:
        """Take elements of a stored tensor from `start` on; they come in ascending order."""
        self._starts.setdefault(stored.key, []).append(start)
        self._views.setdefault(stored.key, []).append(view)

    def column(self, source: Column, start: int, stop: int) -> U8Array:
        """Return elements `start` to `stop` of a column."""
        match source:
            case Stored():
                return self._stored(source, start, stop - start)
            case Rows():
                return self._rows(source, start, stop)
            case Adapted():
                return self._adapted(source, start, stop)

    def _adapted(self, source: Adapted, start: int, stop: int) -> U8Array:
        of, dtype = source.of, source.dtype
        if not source.terms:
            return np.zeros((stop - start) * itemsize(dtype), np.uint8)
        factors = [term.of if isinstance(term, Dora) else term for term in source.terms]
        cols = factors[0].cols
        first, last = start // cols, -(-stop // cols)
        inner = slice(start - first * cols, stop - first * cols)
        out = np.zeros((last - first, cols), np.float64 if dtype == "F64" else np.float32)
        if of is not None:
            out.reshape(-1)[inner] = formed(self.column(of, start, stop), of.dtype, dtype)
        for term, product in zip(source.terms, factors, strict=True):
            left, right = self._shared[product.key]
            if isinstance(term, LowRank):
                begin = product.first_row
                low, high = max(first, begin), min(last, begin + product.groups * product.rows)
                if low < high:
                    into = out[low - first : high - first]
                    add_low_rank(into, left, right, product.scaling, low - begin)
                continue
            delta = np.zeros((last - first, cols), np.float32)
            add_low_rank(delta, left, right, product.scaling, first)
            weight = self.column(term.weight, first * cols, last * cols)
            lengths = self._shared[term.magnitude.key][first:last]
            rows = formed(weight, term.weight.dtype, "F32").reshape(delta.shape)
            add_lengthened(out, delta, rows, lengths)
        return out.reshape(-1)[inner].view(np.uint8)

    def _rows(self, rows: Rows, start: int, stop: int) -> U8Array:
        _, count, source, inner = next(segments(rows, start, stop))
        if count == stop - start and isinstance(source, Stored) and source.dtype == rows.dtype:
            return self._stored(source, inner, count)  # one run, which needs no copy
        size = itemsize(rows.dtype)
        out = np.empty((stop - start) * size, np.uint8)
        if self._take(rows, start, stop, out):
            return out
        for first, count, source, inner in _short(segments(rows, start, stop), rows.dtype):
            into = out[(first - start) * size : (first - start + count) * size]
            match source:
                case None:
                    into[:] = 0
                case Stored():
                    raw = self._stored(source, inner, count)
                    into[:] = converted(raw, source.dtype, rows.dtype)
                case MeanRow():
                    width = itemsize(source.dtype)
                    raw = self._shared[source.key][inner * width : (inner + count) * width]
                    into[:] = converted(raw, source.dtype, rows.dtype)
                case Mean(sources, dtype):
                    raws = [self._rows(one, inner, inner + count) for one in sources]
                    raw = mean(raws, [one.dtype for one in sources], dtype)
                    into[:] = converted(raw, dtype, rows.dtype)
        return out

    def _take(self, rows: Rows, start: int, stop: int, out: U8Array) -> bool:
        """Gather whole rows of stored tensors all at once, into `out`; return whether it was done.

        Where rows lie in disorder, one after another takes longer than the merge.
        """
        size = rows.row_elements
        if start % size or stop % size:
            return False
        first, last = start // size, stop // size
        low = bisect_right(rows.runs.starts, first) - 1
        high = bisect_right(rows.runs.starts, last - 1)
        sources = np.asarray(rows.runs.sources[low:high])
        used = np.unique(sources)
        if high - low < _MANY_RUNS or used[0] < 0:
            return False
        starts = np.append(np.asarray(rows.runs.starts[low:high]), last)
        starts[0] = first
        into = out.reshape(last - first, size * itemsize(rows.dtype))
        numbers = np.arange(first, last)
        run = np.repeat(np.arange(high - low), np.diff(starts))
        before = np.asarray(rows.runs.starts[low:high])
        there = numbers - before[run] + np.asarray(rows.runs.firsts[low:high])[run]
        for number in used.tolist():
            source = rows.sources[number]
            if not isinstance(source, Stored) or source.dtype != rows.dtype:
                return False
            views = self._views[source.key]
            if len(views) > 1 or self._starts[source.key][0] % size:
                return False
            mine = sources[run] == number
            from_row = self._starts[source.key][0] // size
            table = views[0].reshape(-1, into.shape[1])
            into[mine] = table[there[mine] - from_row]
        return True

    def _stored(self, stored: Stored, start: int, count: int) -> U8Array:
        i = bisect_right(self._starts[stored.key], start) - 1
        size = itemsize(stored.dtype)
        offset = (start - self._starts[stored.key][i]) * size
        return self._views[stored.key][i][offset : offset + count * size]


def _short(found: Iterator[Segment], dtype: str) -> Iterator[Segment]:
    """Yield segments of gathered rows, in pieces where their numbers are converted."""
    for first, count, source, inner in found:
        is_copied = source is None or (not isinstance(source, Mean) and source.dtype == dtype)
        step = max(1, count) if is_copied else _CONVERTED_ELEMENTS
        for done in range(0, count, step):
            yield first + done, min(step, count - done), source, inner + done
