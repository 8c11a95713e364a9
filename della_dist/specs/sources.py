"""What an output tensor is made of: a small immutable expression over stored tensors.

Planning asks it what is read; the runtime opens what it names; the kernels see blocks of raw bytes.
A kind of source that is not handled somewhere is an error of mypy there, not a silent default.

What is read is of two kinds. *Streamed* bytes belong to a block, and blocks share none of them;
*resident* ones belong to all blocks, and are read once for a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.passes import least_passes, most_passes
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.runs import Runs
from della_dist.specs.strides import PIECE_BYTES


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes as a file has them."""

    checkpoint: int
    """Index into the inputs of the plan, the reference first."""
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """Safetensors name."""
        return self.entry.dtype

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from other stored tensors."""
        return self.checkpoint, self.entry.shard, self.entry.start


@dataclass(frozen=True, slots=True)
class MeanRow:
    """One row, which stands wherever it is asked for: the mean of rows of a stored tensor.

    The mean of one row is that row, to the bit. Resident.
    """

    of: Stored
    first: int
    count: int
    row_elements: int

    @property
    def dtype(self) -> str:
        """Safetensors name."""
        return self.of.dtype

    @property
    def key(self) -> tuple[int, ...]:
        """What tells it from others."""
        return *self.of.key, self.first, self.count


@dataclass(frozen=True, slots=True)
class Mean:
    """Element by element, the mean of several.

    They are added up in order in float32, or in float64 if any is F64, divided by their number, and
    rounded to `dtype`.
    """

    sources: tuple[Rows, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows, put together of others.

    Rows are along the first axis that has more than one entry. Values that have another dtype
    become `dtype`, which holds them exactly.
    """

    checkpoint: int
    """Whose tensor it stands for."""
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[Stored | MeanRow | Mean, ...]
    """Of a `Mean`, rows have the numbers that they have here."""
    runs: Runs

    @property
    def row_elements(self) -> int:
        """Elements of a row."""
        return num_elements(self.shape) // self.runs.num_rows


Column: TypeAlias = Stored | Rows
"""The tensor of one checkpoint, as a merge sees it."""


@dataclass(frozen=True, slots=True)
class Same:
    """The first of several that are to hold equal bytes: integers, which are not merged."""

    sources: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """What the recipe makes of the base, if it has one, and of the experts."""

    recipe: TensorRecipe
    base: Column | None
    experts: tuple[Column, ...]


Source: TypeAlias = Stored | Rows | Same | Merged

#: Elements of a stored tensor, from, to.
Piece: TypeAlias = tuple[Stored, int, int]


def columns(source: Source) -> tuple[Column, ...]:
    """Return the tensor of every checkpoint that `source` is made of, in its order."""
    match source:
        case Stored() | Rows():
            return (source,)
        case Same(sources):
            return sources
        case Merged(_, base, experts):
            return experts if base is None else (base, *experts)


def streamed(source: Source, start: int, stop: int) -> list[Piece]:
    """Return what elements `start` to `stop` read: disjoint, those of a stored tensor ascending."""
    parts = columns(source)
    if all(isinstance(part, Stored) for part in parts):
        return [(part, start, stop) for part in parts if isinstance(part, Stored)]
    found: dict[tuple[int, int, int], list[Piece]] = {}
    for part in parts:
        for piece in _pieces(part, start, stop):
            found.setdefault(piece[0].key, []).append(piece)
    return [piece for pieces in found.values() for piece in _joined(pieces)]


def _pieces(source: Column | Mean, start: int, stop: int) -> Iterator[Piece]:
    match source:
        case Stored():
            yield source, start, stop
        case Mean(sources):
            for one in sources:
                yield from _pieces(one, start, stop)
        case Rows(sources=sources, runs=runs):
            size = source.row_elements
            up, down = -(-start // size) * size, stop // size * size
            # Whole rows, and pieces of the rows around them.
            edges = sorted({start, min(up, stop), max(start, down), stop})
            for low, high in pairwise(edges):
                row, skipped = divmod(low, size)
                last = -(-high // size)
                cut = last * size - high
                for number, first, end in runs.joined(row, last):
                    inner = sources[number]
                    there = first * size + skipped, end * size - cut
                    if isinstance(inner, Stored):
                        yield inner, *there
                    elif isinstance(inner, Mean):  # a `MeanRow` is resident
                        yield from _pieces(inner, *there)


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    pieces.sort(key=lambda piece: piece[1])
    stored, start, stop = pieces[0]
    for _, first, last in pieces[1:]:
        if first > stop:
            yield stored, start, stop
            start = first
        stop = max(stop, last) if first <= stop else last
    yield stored, start, stop


#: Of gathered rows: the first element, how many, of which source (None: zeros), from which of its.
Segment: TypeAlias = tuple[int, int, Stored | MeanRow | Mean | None, int]


def segments(rows: Rows, start: int, stop: int) -> Iterator[Segment]:
    """Yield what elements `start` to `stop` of gathered rows are, in order.

    Yields
    ------
    tuple
        The first element; how many; of which source, None for zeros; and which element of it is
        the first. Of a `MeanRow`, at most to the end of its row.
    """
    size = rows.row_elements
    for row, count, number, first in rows.runs.within(start // size, -(-stop // size)):
        source = None if number < 0 else rows.sources[number]
        edges = (row * size, (row + count) * size)
        if isinstance(source, MeanRow):
            for one in range(row, row + count):
                low, high = max(start, one * size), min(stop, (one + 1) * size)
                yield low, high - low, source, low - one * size
            continue
        low, high = max(start, edges[0]), min(stop, edges[1])
        yield low, high - low, source, first * size + low - edges[0]


def resident(source: Source) -> tuple[MeanRow, ...]:
    """Return what all blocks of `source` share, each once."""
    found: dict[tuple[int, ...], MeanRow] = {}
    for part in columns(source):
        for one in part.sources if isinstance(part, Rows) else ():
            if isinstance(one, MeanRow):
                found[one.key] = one
    return tuple(found.values())


def gathered(source: Source) -> tuple[int, int]:
    """Return the bytes that gathering rows holds beside the columns: an element, and in all."""
    rows = [part for part in columns(source) if isinstance(part, Rows)]
    read = {stored.key: itemsize(stored.dtype) for part in rows for stored in _stored(part)}
    return sum(read.values()), sum(map(_row_bytes, resident(source)))


def piece_bytes(source: Source) -> int:
    """Return the bytes that each thread holds of what is read to gather a block of views."""
    stored = [one for part in columns(source) for one in _stored(part)]
    stored += [row.of for row in resident(source)]
    return PIECE_BYTES if any(one.entry.strided is not None for one in stored) else 0


def _stored(source: Column | Mean) -> Iterator[Stored]:
    match source:
        case Stored():
            yield source
        case Mean(sources):
            for one in sources:
                yield from _stored(one)
        case Rows(sources=sources):
            for inner in sources:
                if not isinstance(inner, MeanRow):
                    yield from _stored(inner)


def _row_bytes(row: MeanRow) -> int:
    return row.row_elements * itemsize(row.dtype)


def passes(source: Source) -> tuple[int, int]:
    """Return how often `source` is read: at least and at most, as its values decide."""
    match source:
        case Stored() | Rows() | Same():
            return 1, 1
        case Merged(recipe):
            return least_passes(recipe), most_passes(recipe)


def bytes_of_pieces(source: Source) -> list[tuple[Stored, int]]:
    """Return the bytes that one pass over `source` streams, of which stored tensors."""
    parts = columns(source)
    if all(isinstance(part, Stored) for part in parts):
        stored = [part.entry for part in parts if isinstance(part, Stored)]
        sizes = [entry.size_bytes for entry in stored]
        return list(zip([p for p in parts if isinstance(p, Stored)], sizes, strict=True))
    rows = next(part for part in parts if isinstance(part, Rows))
    pieces = streamed(source, 0, num_elements(rows.shape))
    return [(one, (stop - start) * itemsize(one.dtype)) for one, start, stop in pieces]


def bytes_to_read(source: Source) -> tuple[int, int]:
    """Return the bytes that are read of `source`, at least and at most (see `passes`)."""
    least, most = passes(source)
    size = sum([size for _, size in bytes_of_pieces(source)])
    once = sum(row.count * _row_bytes(row) for row in resident(source))
    return least * size + once, most * size + once
