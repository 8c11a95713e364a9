"""System calls that Python does not offer, or makes while it holds its global lock."""

from __future__ import annotations

import ctypes
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
