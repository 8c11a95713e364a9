"""Zero-copy reading of a local file through a memory mapping whose pages are given back."""

from __future__ import annotations

import contextlib
import mmap
import os
from types import TracebackType

import numpy as np

from della_dist.storage import libc
from della_dist.storage.store import ObjectStat, U8Array

#: A page fault maps the pages around it too, those that are in memory, up to this boundary.
_FAULT_AROUND_BYTES = 64 << 10


class MappedReader:
    """A file mapped read-only. Safe to use from several threads.

    One reader costs one file descriptor until it is closed and its last view is gone.

    Parameters
    ----------
    descriptor : int
        Open for reading; the reader duplicates it, the caller closes it.
    stat : ObjectStat
        Size and version of the file at the time it was opened.
    """

    __slots__ = ("_bytes", "_map", "stat")

    def __init__(self, descriptor: int, stat: ObjectStat) -> None:
        self.stat = stat
        self._map: mmap.mmap | None = None
        self._bytes: U8Array | None = np.empty(0, np.uint8)
        if stat.size_bytes:  # an empty file cannot be mapped
            self._map = mmap.mmap(descriptor, stat.size_bytes, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)

    def view(self, start: int, stop: int) -> U8Array:
        """Return the bytes from `start` up to `stop`, shape (stop - start,), read-only, no copy.

        Raises
        ------
        ValueError
            If the range does not lie in the file, or the reader is closed.
        """
        if self._bytes is None:
            raise ValueError("the reader is closed")
        if not 0 <= start <= stop <= self.stat.size_bytes:
            raise ValueError(f"[{start}, {stop}) is not within {self.stat.size_bytes} bytes")
        return self._bytes[start:stop]

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the system to read ahead the bytes from `start` up to `stop`; returns at once."""
        self._advise("MADV_WILLNEED", start, stop)

    def release(self, start: int, stop: int) -> None:
        """Give back the memory of the bytes from `start` up to `stop`.

        The range is rounded outward, beyond the pages that neighbouring ranges share, to those
        that a fault at its edge has mapped. That is harmless (a page of a file that is touched
        again is mapped again, from the page cache), and nothing stays behind for ever.
        """
        self._advise("MADV_DONTNEED", start, stop)

    def close(self) -> None:
        """Let go of the file. Views stay valid; the last of them takes the mapping with it."""
        mapping, self._map, self._bytes = self._map, None, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # views exist: they own the mapping now
                mapping.close()

    def _advise(self, name: str, start: int, stop: int) -> None:
        advice: int | None = getattr(mmap, name, None)  # not every system has each of them
        stop = min(stop, self.stat.size_bytes)  # a reader ahead need not know where the end is
        mapped = self._bytes  # keeps the mapping while another thread closes the reader
        if libc.madvise is None or advice is None or mapped is None or start >= stop:
            return
        first = start - start % _FAULT_AROUND_BYTES
        last = min(stop + -stop % _FAULT_AROUND_BYTES, self.stat.size_bytes)
        # Reading ahead may take 20 ms, for which mmap.madvise would stop all Python threads. A
        # refusal is ignored: it is advice only, the bytes are right without it.
        libc.madvise(mapped.ctypes.data + first, last - first, advice)

    def __enter__(self) -> MappedReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def stat_of(descriptor_stat: os.stat_result) -> ObjectStat:
    """Return what the store says of a file with this stat result."""
    return ObjectStat(descriptor_stat.st_size, str(descriptor_stat.st_mtime_ns))
