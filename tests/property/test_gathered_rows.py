"""What gathered rows read is what their elements are, one by one: no more, and nothing twice.

And what is formed of it is what they are: a copy only where it must be one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from della_dist.runtime.task.formed import FormedBlock
from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.reading import segments, streamed
from della_dist.specs.runs import Runs
from della_dist.specs.sources import Mean, MeanRow, Rows, Stored

_ROWS = 12
#: Sources of a row: zeros, two stored tensors, a resident mean row, a mean of the two tensors.
_ZERO, _MEAN_ROW, _MEAN = -1, 2, 3


def stored(number: int, size: int) -> Stored:
    start = number * 1000
    return Stored(
        0, TensorEntry(f"t{number}", "BF16", (_ROWS, size), 0, start, start + 2 * _ROWS * size)
    )


@st.composite
def gathered(draw: st.DrawFn) -> Rows:
    size = draw(st.integers(1, 3))
    one, two, three = (stored(number, size) for number in range(3))
    numbers = st.integers(0, _ROWS - 1)
    inner = [
        Rows(0, (_ROWS, size), "BF16", (of,), Runs.of((0, draw(numbers)) for _ in range(_ROWS)))
        for of in (one, two)
    ]
    sources = (one, two, MeanRow(three, 0, 3, size), Mean(tuple(inner), "BF16"))
    rows: list[tuple[int, int]] = []
    for source, first, count in draw(
        st.lists(st.tuples(st.integers(_ZERO, _MEAN), numbers, st.integers(1, 4)), min_size=1)
    ):
        last = min(first + count, _ROWS)
        rows += [(source, 0 if source == _MEAN_ROW else row) for row in range(first, last)]
    return Rows(0, (len(rows), size), "BF16", sources, Runs.of(rows))


def read(rows: Rows, element: int) -> Iterator[tuple[str, int]]:
    """Yield the stored elements that an element of gathered rows is made of."""
    ((_, _, source, there),) = segments(rows, element, element + 1)
    match source:
        case Stored():
            yield source.entry.name, there
        case Mean(sources):
            for one in sources:
                yield from read(one, there)


@given(rows=gathered(), data=st.data())
@pytest.mark.parametrize("whole_rows", [True, False])
def test_streamed(rows: Rows, whole_rows: bool, data: st.DataObject) -> None:
    unit = rows.row_elements if whole_rows else 1
    total = rows.shape[0] * rows.row_elements // unit
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    wanted = {one for e in range(start * unit, stop * unit) for one in read(rows, e)}
    pieces = streamed(rows, start * unit, stop * unit)
    found = [(one.entry.name, e) for one, first, last in pieces for e in range(first, last)]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    for name in {one.entry.name for one, _, _ in pieces}:
        edges = [(first, last) for one, first, last in pieces if one.entry.name == name]
        assert all(a[1] < b[0] for a, b in pairwise(edges))  # none touch


@given(rows=gathered(), data=st.data())
def test_formed(rows: Rows, data: st.DataObject) -> None:
    total = rows.shape[0] * rows.row_elements
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    files = {f"t{n}": np.arange(100 * n, 100 * n + 99, dtype=np.uint16) for n in (1, 2, 3)}
    one, two, mean_row, _ = rows.sources
    assert not isinstance(one, Mean)
    assert not isinstance(two, Mean)
    assert not isinstance(mean_row, Mean)
    tensors = dict(zip((one.key, two.key), (files["t1"], files["t2"]), strict=True))
    row = files["t3"][: rows.row_elements].view(np.uint8)
    block = FormedBlock({mean_row.key: row})
    for piece, first, last in streamed(rows, start, stop):
        block.add(piece, first, tensors[piece.key][first:last].view(np.uint8))
    found = block.column(rows, start, stop)
    parts = list(segments(rows, start, stop))
    for first, count, source, inner in parts:
        numbers = found.view(np.uint16)[first - start : first - start + count]
        if isinstance(source, Stored):
            assert numbers.tolist() == tensors[source.key][inner : inner + count].tolist()
        elif source is None:
            assert not numbers.any()
    is_view = any(np.shares_memory(found, tensor) for tensor in tensors.values())
    assert is_view == (len(parts) == 1 and isinstance(parts[0][2], Stored))
