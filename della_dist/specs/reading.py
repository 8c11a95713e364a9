"""What is read of the stored tensors that a source is made of: which ranges, and how many bytes.

What is read is of two kinds. *Streamed* bytes belong to a block, and blocks share none of them;
*resident* ones belong to all blocks, and are read once for a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TypeAlias

from della_dist.specs.balancing import balancing
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.factoring import factoring
from della_dist.specs.passes import least_passes, most_passes
from della_dist.specs.sources import (
    Adapted,
    Balanced,
    Column,
    Dora,
    Factor,
    Key,
    LowRank,
    Mean,
    MeanRow,
    Merged,
    Rows,
    Same,
    Source,
    Stored,
    columns,
)
from della_dist.specs.strides import PIECE_BYTES

#: Elements of a stored tensor, from, to.
Piece: TypeAlias = tuple[Stored, int, int]

#: What all blocks of a tensor share.
Resident: TypeAlias = MeanRow | LowRank | Stored


def streamed(source: Source, start: int, stop: int) -> list[Piece]:
    """Return what elements `start` to `stop` read: disjoint, those of a stored tensor ascending."""
    parts = columns(source)
    if all(isinstance(part, Stored) for part in parts):
        return [(part, start, stop) for part in parts if isinstance(part, Stored)]
    found: dict[Key, list[Piece]] = {}
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
        case Adapted(of=of, terms=terms):
            for weight in (of, *(term.weight for term in terms if isinstance(term, Dora))):
                if weight is not None:
                    yield from _pieces(weight, *_whole_rows(source, start, stop))
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


def _whole_rows(source: Adapted, start: int, stop: int) -> tuple[int, int]:
    """Return elements `start` to `stop`, and more of their rows where these count as a whole."""
    for term in source.terms:
        if isinstance(term, Dora):
            cols = term.of.cols
            return start // cols * cols, -(-stop // cols) * cols
    return start, stop


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


def resident(source: Source) -> tuple[Resident, ...]:
    """Return what all blocks of `source` share, each once."""
    found: dict[Key, Resident] = {}
    for part in columns(source):
        match part:
            case Rows(sources=sources):
                found |= {one.key: one for one in sources if isinstance(one, MeanRow)}
            case Adapted(terms=terms):
                for term in terms:
                    factors = term.of if isinstance(term, Dora) else term
                    found[factors.key] = factors
                    if isinstance(term, Dora):
                        found[term.magnitude.key] = term.magnitude
    return tuple(found.values())


def gathered(source: Source) -> tuple[int, int]:
    """Return the bytes that forming columns holds beside them: an element, and in all."""
    parts = [part for part in columns(source) if not isinstance(part, Stored)]
    read = {stored.key: itemsize(stored.dtype) for part in parts for stored in _stored(part)}
    # A product of factors, and for its length a row of the weight.
    formed = any(isinstance(part, Adapted) and part.terms for part in parts)
    return sum(read.values()) + 8 * formed, sum(map(_resident_bytes, resident(source)))


def piece_bytes(source: Source) -> int:
    """Return the bytes that each thread holds of what is read to gather a block of views."""
    stored = [one for part in columns(source) for one in _stored(part)]
    for shared in resident(source):
        match shared:
            case MeanRow(of):
                stored.append(of)
            case LowRank(left, right):
                stored += (left, right)
            case Stored():
                stored.append(shared)
    return PIECE_BYTES if any(one.entry.strided is not None for one in stored) else 0


def _stored(source: Column | Mean) -> Iterator[Stored]:
    """Yield what one element is made of, at most."""
    match source:
        case Stored():
            yield source
        case Mean(sources):
            for one in sources:
                yield from _stored(one)
        case Rows(sources=sources):
            pieces = [inner for inner in sources if isinstance(inner, Stored)]
            if len(pieces) == len(sources) and len({piece.checkpoint for piece in pieces}) == 1:
                yield max(pieces, key=lambda piece: itemsize(piece.dtype))  # it is in one of them
                return
            for inner in sources:
                if not isinstance(inner, MeanRow):
                    yield from _stored(inner)
        case Adapted(of=of, terms=terms):
            for weight in (of, *(term.weight for term in terms if isinstance(term, Dora))):
                if weight is not None:
                    yield from _stored(weight)


def _resident_bytes(one: Resident) -> int:
    """Return the bytes that are held of it while blocks are merged: of factors, as float32."""
    match one:
        case MeanRow():
            return one.row_elements * itemsize(one.dtype)
        case LowRank():
            size = one.groups * one.rank * (one.rows + one.cols)
            # While they are read, as they are stored, too.
            return 4 * size + max(map(_piece_bytes, one.read()))
        case Stored():
            return 4 * num_elements(one.entry.shape)


def read_once(one: Resident) -> int:
    """Return the bytes that are read of it."""
    match one:
        case MeanRow():
            return one.count * one.row_elements * itemsize(one.dtype)
        case LowRank():
            return sum(map(_piece_bytes, one.read()))
        case Stored():
            return one.entry.stop - one.entry.start


def _piece_bytes(piece: Piece) -> int:
    stored, start, stop = piece
    return (stop - start) * itemsize(stored.dtype)


def passes(source: Source) -> tuple[int, int]:
    """Return how often `source` is read: at least and at most, as its values decide."""
    match source:
        case Stored() | Rows() | Same():
            return 1, 1
        case Merged(recipe):
            return least_passes(recipe), most_passes(recipe)
        case Balanced(of):
            again = balancing(source).passes - 1
            return least_passes(of.recipe) + again, most_passes(of.recipe) + again
        case Factor(of, rank=rank, is_sum=is_sum):
            if is_sum:  # only what is resident
                return 0, 0
            again = factoring(of.recipe, rank).forms - 1
            return least_passes(of.recipe) + again, most_passes(of.recipe) + again


def bytes_of_pieces(source: Source) -> list[tuple[Stored, int]]:
    """Return the bytes that one pass over `source` streams, of which stored tensors."""
    parts = columns(source)
    if all(isinstance(part, Stored) for part in parts):
        stored = [part.entry for part in parts if isinstance(part, Stored)]
        sizes = [entry.size_bytes for entry in stored]
        return list(zip([p for p in parts if isinstance(p, Stored)], sizes, strict=True))
    formed = next(part for part in parts if not isinstance(part, Stored))
    pieces = streamed(source, 0, num_elements(formed.shape))
    return [(one, (stop - start) * itemsize(one.dtype)) for one, start, stop in pieces]


def bytes_to_read(source: Source) -> tuple[int, int]:
    """Return the bytes that are read of `source`, at least and at most (see `passes`)."""
    if isinstance(source, Factor) and source.side == "right":
        return 0, 0  # made together with the left one
    least, most = passes(source)
    size = sum([size for _, size in bytes_of_pieces(source)])
    once = sum(map(read_once, resident(source)))
    return least * size + once, most * size + once
