"""Zero-copy reading of a local file through a memory mapping whose pages are given back."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from della_dist.errors import StorageError
from della_dist.specs.checkpoint import FileVersion
from della_dist.storage import libc
from della_dist.storage.local import bus_errors
from della_dist.storage.store import ObjectStat, U8Array

#: A page fault maps the pages around it too, those that are in memory, up to this boundary.
_FAULT_AROUND_BYTES = 64 << 10


class _Mapping:
    """A file's bytes in memory, as NumPy takes them; unmapped when the last array is gone."""

    __slots__ = ("__array_interface__", "pages")

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        address = libc.map_file(descriptor, size_bytes)
        self.pages = bus_errors.Pages(address, size_bytes)
        self.__array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, True),  # read-only
            "version": 3,
        }
        bus_errors.add(self.pages)

    def __del__(self) -> None:
        if hasattr(self, "pages"):  # or the system refused
            bus_errors.remove(self.pages)  # before the address may become that of another
            libc.unmap(self.pages.address, self.pages.size_bytes)


class MappedReader:
    """A file mapped read-only. Safe to use from several threads. Takes no file descriptor.

    Parameters
    ----------
    descriptor : int
        Open for reading; the caller closes it.
    stat : ObjectStat
        Size and version of the file at the time it was opened.
    path : str
        Where it lies, for messages.
    """

    __slots__ = ("_bytes", "_pages", "_path", "stat")

    def __init__(self, descriptor: int, stat: ObjectStat, path: str) -> None:
        self.stat = stat
        self._path = path
        self._pages: bus_errors.Pages | None = None
        self._bytes: U8Array | None = np.empty(0, np.uint8)
        if stat.size_bytes:  # an empty file cannot be mapped
            mapping = _Mapping(descriptor, stat.size_bytes)
            self._pages = mapping.pages
            self._bytes = np.asarray(mapping)

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

        Raises
        ------
        StorageError
            If bytes of the file could not be read, so that zeros were seen in their place.
        """
        self._advise("MADV_DONTNEED", start, stop)
        if self._pages is not None and self._pages.is_damaged:
            raise StorageError(
                f"reading {self._path} failed: it was cut short while it was read, or the device "
                "reports an I/O error (dmesg). Check the file, then run the command again."
            )

    def close(self) -> None:
        """Let go of the file. Views stay valid; the last of them takes the mapping with it."""
        self._bytes = None

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

    def __exit__(self, *_: object) -> None:
        self.close()


def stat_of(descriptor_stat: os.stat_result) -> ObjectStat:
    """Return what the store says of a file with this stat result."""
    found = descriptor_stat
    version = FileVersion(found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return ObjectStat(found.st_size, str(version))
