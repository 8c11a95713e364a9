"""A digest of a few blocks of a file: cheap, and another one for nearly every other content.

It tells files apart whose size and times say nothing (``tar --mtime``, container layers, copies on
another machine), without reading them whole. It is no checksum: a change between the blocks is not
seen.
"""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3

from della_dist.storage.store import Bytes, as_bytes

#: Blocks that are looked at, at equal distances: the first and the last bytes are among them.
SAMPLES = 16
SAMPLE_BYTES = 64 << 10


def sample_ranges(size_bytes: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the blocks, ascending and disjoint; small files are taken whole."""
    if size_bytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, size_bytes)] if size_bytes else []
    last = size_bytes - SAMPLE_BYTES
    starts = (last * i // (SAMPLES - 1) for i in range(SAMPLES))
    return [(start, start + SAMPLE_BYTES) for start in starts]


def sample_digest(read: Callable[[int, int], Bytes], size_bytes: int) -> str:
    """Return the BLAKE3 of the sampled blocks of a file.

    Parameters
    ----------
    read
        ``read(start, stop)`` returns exactly those bytes of it.
    size_bytes
        Of the file.
    """
    digest = blake3()
    for start, stop in sample_ranges(size_bytes):
        digest.update(as_bytes(read(start, stop)))
    return digest.hexdigest()


class SampleHasher:
    """The same digest of a file whose bytes come in order, from the first to the last."""

    __slots__ = ("_digest", "_position", "_ranges")

    def __init__(self, size_bytes: int) -> None:
        self._ranges = sample_ranges(size_bytes)[::-1]
        self._digest = blake3()
        self._position = 0

    def update(self, buffer: Bytes) -> None:
        """Take the next bytes of the file."""
        data = as_bytes(buffer)
        begin, self._position = self._position, self._position + data.nbytes
        while self._ranges and self._ranges[-1][0] < self._position:
            start, stop = self._ranges[-1]
            self._digest.update(data[max(0, start - begin) : max(0, stop - begin)])
            if stop > self._position:
                return
            self._ranges.pop()

    def hexdigest(self) -> str:
        """Return the digest, once all bytes have come."""
        return self._digest.hexdigest()
