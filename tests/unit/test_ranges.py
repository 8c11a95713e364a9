"""Which requests read a number of byte ranges."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from della_dist.storage.ranges import MAX_GAP_BYTES, Span, coalesce, pieces

GAP = MAX_GAP_BYTES


@pytest.mark.parametrize(
    ("ranges", "max_bytes", "spans"),
    [
        ([], 100, []),
        ([(5, 9)], 100, [Span(5, 9, (0,))]),
        ([(0, 10), (10, 20)], 100, [Span(0, 20, (0, 1))]),
        ([(10, 20), (0, 10)], 100, [Span(0, 20, (0, 1))]),
        ([(0, 10), (10, 20)], 19, [Span(0, 10, (0,)), Span(10, 20, (1,))]),
        ([(0, 200), (200, 210)], 100, [Span(0, 200, (0,)), Span(200, 210, (1,))]),
        ([(0, 10), (0, 10)], 5, [Span(0, 10, (0, 1))]),
        ([(0, 1), (1 + GAP, 2 + GAP)], 2 * GAP, [Span(0, 2 + GAP, (0, 1))]),
        ([(0, 1), (2 + GAP, 3 + GAP)], 2 * GAP, [Span(0, 1, (0,)), Span(2 + GAP, 3 + GAP, (1,))]),
        # The order of use, not of place.
        ([(50, 60), (0, 10), (60, 70)], 20, [Span(50, 70, (0, 2)), Span(0, 10, (1,))]),
    ],
)
def test_examples(ranges: list[tuple[int, int]], max_bytes: int, spans: list[Span]) -> None:
    assert coalesce(ranges, max_bytes) == spans


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw ranges that touch at most, some of them several times, in any order."""
    sizes = st.tuples(st.sampled_from([0, 0, 1, 1000, GAP, GAP + 1]), st.integers(1, 5000))
    ranges = []
    at = 0
    for gap, size in draw(st.lists(sizes, max_size=30)):
        ranges.append((at + gap, at + gap + size))
        at += gap + size
    repeated = draw(st.lists(st.sampled_from(ranges), max_size=5)) if ranges else []
    return draw(st.permutations(ranges + repeated))


@given(disjoint_ranges(), st.integers(1, 20_000))
def test_every_range_is_read_once_and_little_else(
    ranges: list[tuple[int, int]], max_bytes: int
) -> None:
    spans = coalesce(ranges, max_bytes)
    assert sorted(i for span in spans for i in span.members) == list(range(len(ranges)))
    assert [s.members[0] for s in spans] == sorted(s.members[0] for s in spans)
    for span in spans:
        mine = sorted({ranges[i] for i in span.members})
        assert span.members == tuple(sorted(span.members))
        assert (span.start, span.stop) == (mine[0][0], mine[-1][1])
        assert span.stop - span.start <= max_bytes or len(mine) == 1
        assert all(later[0] - earlier[1] <= GAP for earlier, later in pairwise(mine))
    # Equal ranges are read once, and no two spans overlap.
    places = sorted((s.start, s.stop) for s in spans)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(places))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=20), st.integers(1, 60))
def test_ranges_that_overlap(sizes: list[tuple[int, int]], max_bytes: int) -> None:
    ranges = [(start, start + size) for start, size in sizes]
    spans = coalesce(ranges, max_bytes)
    assert sorted(i for span in spans for i in span.members) == list(range(len(ranges)))
    for span in spans:
        mine = [ranges[i] for i in span.members]
        assert span.start == min(start for start, _ in mine)
        assert span.stop == max(stop for _, stop in mine)
        assert span.stop - span.start <= max(max_bytes, *(stop - start for start, stop in mine))


@given(disjoint_ranges(), st.integers(1, 20_000))
def test_neighbours_are_not_left_apart(ranges: list[tuple[int, int]], max_bytes: int) -> None:
    spans = sorted(coalesce(ranges, max_bytes), key=lambda span: span.start)
    for earlier, later in pairwise(spans):
        first = min(ranges[i] for i in later.members)
        assert first[0] - earlier.stop > GAP or first[1] - earlier.start > max_bytes


@given(st.integers(0, 10**12), st.integers(0, 10**9), st.integers(1 << 20, 10**8))
def test_pieces(start: int, size: int, max_bytes: int) -> None:
    cut = list(pieces(start, start + size, max_bytes))
    assert cut[0][0] == start
    assert cut[-1][1] == start + size
    assert all(earlier[1] == later[0] for earlier, later in pairwise(cut))
    sizes = {last - first for first, last in cut}
    assert max(sizes) <= max_bytes
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == max(1, -(-size // max_bytes))
