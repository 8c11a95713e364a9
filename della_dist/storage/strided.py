"""Views that are no range of bytes, gathered block by block: transposed, cut, repeated tensors.

The data is read in pieces of bounded size, and only what holds elements of the block is read, to
within such a piece. A matrix that is stored transposed is therefore read as a whole for every block
of its rows: right and bounded, but slower than one that is stored as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.specs.checkpoint import Strided
from della_dist.specs.strides import PIECE_BYTES, reach
from della_dist.storage.store import Bytes, U8Array

Read: TypeAlias = Callable[[int, int], Bytes]
Release: TypeAlias = Callable[[int, int], None]

#: Position of the first element, shape and strides of a part of a view, in elements.
_Box: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


def gather(
    view: Strided, itemsize: int, start: int, stop: int, read: Read, release: Release | None = None
) -> U8Array:
    """Return the bytes of elements `start` to `stop` of a view, in row-major order.

    Parameters
    ----------
    view
        How it lies in its data; it has axes.
    itemsize
        Bytes of an element: 1, 2, 4 or 8.
    start, stop
        Of the view's elements.
    read
        ``read(first, last)`` returns those bytes, counted from the view's first element: at most
        `PIECE_BYTES` at once.
    release
        Told when what `read` returned is no more needed.
    """
    out = np.empty(stop - start, f"<u{itemsize}")
    done = 0
    for at, shape, strides in _boxes(view.shape, view.strides, start, stop, 0):
        count = math.prod(shape)
        _fill(out[done : done + count].reshape(shape), (at, shape, strides), read, release)
        done += count
    return out.view(np.uint8)


def _boxes(
    shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int, at: int
) -> Iterator[_Box]:
    """Yield what elements `start` to `stop` are, in order, as views with the same strides."""
    if start == stop:
        return
    if len(shape) == 1:
        yield at + start * strides[0], (stop - start,), strides
        return
    inner = math.prod(shape[1:])
    first, skipped = divmod(start, inner)
    last, rest = divmod(stop, inner)
    if first == last:
        yield from _boxes(shape[1:], strides[1:], skipped, rest, at + first * strides[0])
        return
    if skipped:
        yield from _boxes(shape[1:], strides[1:], skipped, inner, at + first * strides[0])
        first += 1
    if first < last:
        yield at + first * strides[0], (last - first, *shape[1:]), strides
    yield from _boxes(shape[1:], strides[1:], 0, rest, at + last * strides[0])


def _fill(
    out: npt.NDArray[np.unsignedinteger], box: _Box, read: Read, release: Release | None
) -> None:
    """Fill `out` with a box, cut along its longest way until each part is a piece."""
    at, shape, strides = box
    size = out.itemsize
    count = reach(shape, strides)
    if count * size > PIECE_BYTES:
        ways = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        axis = ways.index(max(ways))
        half = shape[axis] // 2
        for first, last in ((0, half), (half, shape[axis])):
            part = (*shape[:axis], last - first, *shape[axis + 1 :])
            index = (*(slice(None),) * axis, slice(first, last))
            _fill(out[index], (at + first * strides[axis], part, strides), read, release)
        return
    raw = read(at * size, (at + count) * size)
    steps = tuple(stride * size for stride in strides)
    out[...] = np.ndarray(shape, out.dtype, raw, 0, steps)
    if release is not None:
        del raw
        release(at * size, (at + count) * size)
