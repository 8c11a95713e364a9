"""How far the elements of a strided view lie apart, and how much of it is read at once."""

from __future__ import annotations

from collections.abc import Sequence

#: Bytes that are read at once of a view that is no range of bytes.
PIECE_BYTES = 1 << 20


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements of its data from a view's first element to its last; it has some."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
