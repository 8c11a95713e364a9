"""System calls that Python does not offer, or makes while it holds its global lock."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable


def find_call(name: str, *argument_types: type) -> Callable[..., int] | None:
    """Return the C library's function `name`, or None where there is none.

    ctypes lets other threads run during the call.
    """
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    found: Callable[..., int] = function
    return found


#: int madvise(void *address, size_t length, int advice)
madvise = find_call("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
#: int sync_file_range(int descriptor, off64_t offset, off64_t length, unsigned flags): Linux
sync_file_range = find_call(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
#: int mallopt(int parameter, int value): glibc
mallopt = find_call("mallopt", ctypes.c_int, ctypes.c_int)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10  # the same on Linux, macOS and the BSDs; not in Python's mmap


def make_durable(descriptor: int) -> None:
    """Return once what was written to a file or directory would survive a power cut.

    On macOS fsync only hands it to the disk, which may keep it in its cache; F_FULLFSYNC has it
    written, where the file system knows that.
    """
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):  # network file systems, FAT: fsync tells what is wrong
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20
_KEPT_BYTES = 16 << 20


def map_file(descriptor: int, size_bytes: int) -> int:
    """Map a file read-only and return the address; the descriptor may be closed after that.

    `mmap.mmap` would keep one of its own open for as long as the mapping lives.

    Raises
    ------
    OSError
        If the system refuses.
    """
    return _mmap(None, size_bytes, mmap.MAP_SHARED, descriptor)


def map_zeros_over(address: int, size_bytes: int) -> None:
    """Put zeros in the place of mapped pages; `address` is that of a page."""
    _mmap(address, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1)


def unmap(address: int, size_bytes: int) -> None:
    """Take a mapping away."""
    _libc.munmap(address, size_bytes)


def _mmap(address: int | None, size_bytes: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, size_bytes, mmap.PROT_READ, flags, descriptor, 0)
    if found == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def free_large_buffers_at_once() -> None:
    """Have freed buffers of a MiB and more go back to the system. Harmless when repeated.

    It holds for the whole process: done when a run with a remote store begins, whose buffers are
    what is read ahead and uploaded.

    glibc does so at first, but with the first large buffer that is freed it begins to keep those
    of its size: every thread's heap then grows by all that its buffers ever were, in its own gaps.
    """
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        # Setting the other would bring this down to 128 KiB, and a system call with every block.
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
