"""The columns of a tensor: what each checkpoint gives to it, block by block.

Nearly all are stored as they are, and are viewed without a copy. Rows that were moved are gathered:
whatever the columns of a block share is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from della_dist.ops.forming import F32Array, dense, mean_row
from della_dist.runtime.task.formed import FormedBlock, Shared
from della_dist.runtime.task.inputs import InputReaders, TensorBytes
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.reading import (
    Piece,
    Resident,
    resident,
    streamed,
)
from della_dist.specs.sources import (
    Key,
    LowRank,
    MeanRow,
    Source,
    Stored,
    columns,
)
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array

#: Bytes of rows that are added up at once, which the last bit of the result depends on.
_CHUNK_BYTES = 128 << 10


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
        self._tensors: dict[Key, TensorBytes] = {}
        self._lock = threading.Lock()
        self._found: dict[tuple[int, int], list[Piece]] = {}
        self._resident: Shared | None = None
        self._reading_resident = threading.Lock()
        self._told_resident = False

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
        if not self._told_resident:  # all of it is read with the first block
            self._told_resident = True
            pieces = [*_whole_pieces(resident(self._source)), *pieces]
        wants = (self._tensor(one).want(first, last) for one, first, last in pieces)
        return [want for want in wants if want is not None]

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for elements `start` to `stop` to be read in the background."""
        for one, first, last in self._pieces(start, stop):
            self._tensor(one).prefetch(first, last)

    def views(self, start: int, stop: int) -> list[U8Array]:
        """Return the bytes of elements `start` to `stop` of each column."""
        block = FormedBlock(self._shared())
        for one, first, last in self._pieces(start, stop):
            block.add(one, first, self._tensor(one).view(first, last))
        return [block.column(column, start, stop) for column in self._columns]

    def release(self, start: int, stop: int) -> None:
        """Give the memory of elements `start` to `stop` back; views of them stay valid."""
        for one, first, last in self._pieces(start, stop):
            self._tensor(one).release(first, last)
        with self._lock:
            self._found.pop((start, stop), None)

    def factors_of(self, product: LowRank) -> tuple[F32Array, F32Array]:
        """Return the factors of an adapter: (G, R, K) and (G, K, C)."""
        factors: tuple[F32Array, F32Array] = self._shared()[product.key]
        return factors

    def _shared(self) -> Shared:
        """Return what all blocks share; reads it the first time."""
        with self._reading_resident:
            if self._resident is None:
                self._resident = {one.key: self._read(one) for one in resident(self._source)}
            return self._resident

    def _read(self, one: Resident) -> Any:  # noqa: ANN401
        """Return bytes of a row; float32 arrays of factors: (G, R, K) and (G, K, C); of lengths."""
        match one:
            case MeanRow():
                return self._mean_row(one)
            case LowRank():
                left, right = one.read()
                return (
                    self._dense(left, one.left_shape, one.left_strides),
                    self._dense(right, one.right_shape, one.right_strides),
                )
            case Stored():
                count = num_elements(one.entry.shape)
                return self._dense((one, 0, count), (count,), (1,))

    def _dense(self, piece: Piece, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:  # noqa: ANN401
        stored, start, stop = piece
        tensor = self._tensor(stored)
        numbers = dense(tensor.view(start, stop), stored.dtype, shape, strides)
        tensor.release(start, stop)
        return numbers

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


def _whole_pieces(shared: Sequence[Resident]) -> Iterator[Piece]:
    for one in shared:
        if isinstance(one, LowRank):
            yield from one.read()
