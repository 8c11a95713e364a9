"""The columns of a tensor: what each checkpoint gives to it, block by block.

Nearly all are stored as they are, and are viewed without a copy. Rows that were moved are gathered:
whatever the columns of a block share is read once.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from della_dist.ops.forming import converted, mean, mean_row
from della_dist.runtime.task.inputs import InputReaders, TensorBytes
from della_dist.specs.dtypes import itemsize
from della_dist.specs.sources import (
    Column,
    Mean,
    MeanRow,
    Piece,
    Rows,
    Segment,
    Source,
    Stored,
    columns,
    resident,
    segments,
    streamed,
)
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array

#: Bytes of rows that are added up at once, which the last bit of the result depends on; and
#: elements that are converted: a few MiB of float64.
_CHUNK_BYTES = 128 << 10
_CONVERTED_ELEMENTS = 16 << 10

#: Runs in a block from which on rows are gathered all at once.
_MANY_RUNS = 16


def open_columns(readers: InputReaders, source: Source) -> Columns:
    """Return the columns of `source`, in its order, ready to be read."""
    parts = columns(source)
    stored = [part for part in parts if isinstance(part, Stored)]
    if len(stored) == len(parts):
        return StoredColumns([readers.bytes_of(part) for part in stored])
    return GatheredColumns(readers, source)


class StoredColumns:
    """Columns that are stored as they are."""

    def __init__(self, tensors: Sequence[TensorBytes]) -> None:
        self._tensors = tensors

    def wants(self, start: int, stop: int) -> list[Want]:
        """Return what elements `start` to `stop` ask of remote stores."""
        wants = (tensor.want(start, stop) for tensor in self._tensors)
        return [want for want in wants if want is not None]

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for elements `start` to `stop` to be read in the background."""
        for tensor in self._tensors:
            tensor.prefetch(start, stop)

    def views(self, start: int, stop: int) -> list[U8Array]:
        """Return the bytes of elements `start` to `stop` of each column, read-only."""
        return [tensor.view(start, stop) for tensor in self._tensors]

    def release(self, start: int, stop: int) -> None:
        """Give the memory of elements `start` to `stop` back; views of them stay valid."""
        for tensor in self._tensors:
            tensor.release(start, stop)


class GatheredColumns:
    """Columns of which some are rows of several tensors; see `StoredColumns`."""

    def __init__(self, readers: InputReaders, source: Source) -> None:
        self._readers = readers
        self._source = source
        self._columns = columns(source)
        self._tensors: dict[tuple[int, int, int], TensorBytes] = {}
        self._lock = threading.Lock()
        self._found: dict[tuple[int, int], list[Piece]] = {}
        self._resident: dict[tuple[int, ...], U8Array] | None = None
        self._reading_resident = threading.Lock()

    def _tensor(self, stored: Stored) -> TensorBytes:
        with self._lock:
            if stored.key not in self._tensors:
                self._tensors[stored.key] = self._readers.bytes_of(stored)
            return self._tensors[stored.key]

    def _pieces(self, start: int, stop: int) -> list[Piece]:
        """Return what a block reads, which is asked three times of each."""
        with self._lock:
            found = self._found.get((start, stop))
        if found is None:
            found = streamed(self._source, start, stop)
            with self._lock:
                self._found[start, stop] = found
        return found

    def wants(self, start: int, stop: int) -> list[Want]:
        """Return what elements `start` to `stop` ask of remote stores."""
        pieces = streamed(self._source, start, stop)
        wants = (self._tensor(one).want(first, last) for one, first, last in pieces)
        return [want for want in wants if want is not None]

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for elements `start` to `stop` to be read in the background."""
        for one, first, last in self._pieces(start, stop):
            self._tensor(one).prefetch(first, last)

    def views(self, start: int, stop: int) -> list[U8Array]:
        """Return the bytes of elements `start` to `stop` of each column."""
        block = _Block(self._shared())
        for one, first, last in self._pieces(start, stop):
            block.add(one, first, self._tensor(one).view(first, last))
        return [block.column(column, start, stop) for column in self._columns]

    def release(self, start: int, stop: int) -> None:
        """Give the memory of elements `start` to `stop` back; views of them stay valid."""
        for one, first, last in self._pieces(start, stop):
            self._tensor(one).release(first, last)
        with self._lock:
            self._found.pop((start, stop), None)

    def _shared(self) -> dict[tuple[int, ...], U8Array]:
        """Return the rows that all blocks share; reads them the first time."""
        with self._reading_resident:
            if self._resident is None:
                self._resident = {r.key: self._mean_row(r) for r in resident(self._source)}
            return self._resident

    def _mean_row(self, row: MeanRow) -> U8Array:
        tensor, size = self._tensor(row.of), row.row_elements
        step = max(1, _CHUNK_BYTES // (size * itemsize(row.dtype)))

        def chunks() -> Iterator[U8Array]:
            for first in range(row.first, row.first + row.count, step):
                last = min(first + step, row.first + row.count)
                yield tensor.view(first * size, last * size)
                tensor.release(first * size, last * size)

        return mean_row(chunks(), row.count, size, row.dtype)


Columns: TypeAlias = StoredColumns | GatheredColumns


class _Block:
    """What one block has read, and what is gathered of it."""

    def __init__(self, shared: dict[tuple[int, ...], U8Array]) -> None:
        self._shared = shared
        self._starts: dict[tuple[int, int, int], list[int]] = {}
        self._views: dict[tuple[int, int, int], list[U8Array]] = {}

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

    def _rows(self, rows: Rows, start: int, stop: int) -> U8Array:
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
