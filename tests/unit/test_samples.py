"""The digest of sampled blocks."""

from __future__ import annotations

import random

import pytest

from della_dist.storage.samples import (
    SAMPLE_BYTES,
    SAMPLES,
    SampleHasher,
    sample_digest,
    sample_ranges,
)

WHOLE = SAMPLES * SAMPLE_BYTES
SIZES = (0, 1, WHOLE - 1, WHOLE, WHOLE + 1, WHOLE + SAMPLE_BYTES, 3 * WHOLE + 12_345)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_bounded_disjoint_and_reach_both_ends(size: int) -> None:
    ranges = sample_ranges(size)
    assert sum(stop - start for start, stop in ranges) == min(size, WHOLE)
    edges = [edge for pair in ranges for edge in pair]
    assert edges == sorted(edges)
    if size:
        assert (edges[0], edges[-1]) == (0, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_has_the_digest_of_the_file(size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    hasher = SampleHasher(size)
    position = 0
    while position < size:
        step = rng.choice((1, 7, SAMPLE_BYTES, 100_000, 1 << 20))
        hasher.update(data[position : position + step])
        position += step
    assert hasher.hexdigest() == sample_digest(lambda a, b: data[a:b], size)


def test_a_changed_block_changes_the_digest() -> None:
    size = 3 * WHOLE
    data = bytearray(size)
    before = sample_digest(lambda a, b: data[a:b], size)
    for start, stop in sample_ranges(size):
        data[stop - 1] ^= 1
        assert sample_digest(lambda a, b: data[a:b], size) != before
        data[stop - 1] ^= 1
        assert start < stop
    assert sample_digest(lambda a, b: data[a:b], size) == before
