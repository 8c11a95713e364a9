"""Reading a mapped file that was cut short: an error that is told, not the end of the process.

The system answers the reading of a mapped page that is not there any more (the file was cut short,
or its device fails) by SIGBUS, of which a process dies without a word. Within `survived`, zeros
take the place of the rest of such a mapping and its `Pages` are marked as damaged, upon which its
reader raises. The kernel that was reading goes on and computes nonsense, which nobody ever sees.

Python's own `signal` module cannot do this: its handlers run when the interpreter comes around to
them, but the instruction that failed would be repeated, and fail, for ever before that. This one
runs at once, in the thread that failed. Python code may run there: such a thread is reading memory,
holds no lock but perhaps the interpreter's, and takes that one here as any callback from C does.

Only where the layout of what the system hands over is known: Linux on 64 bits of x86 and ARM.
Elsewhere, `survived` changes nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from della_dist.storage import libc

_IS_SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


@dataclass(eq=False, slots=True)
class Pages:
    """A mapping of a file, known to the handler as long as it exists."""

    address: int
    size_bytes: int
    is_damaged: bool = False
    """Whether something was read as zeros because it could not be read."""


_mappings: dict[int, Pages] = {}


def add(pages: Pages) -> None:
    """Make a mapping known."""
    _mappings[pages.address] = pages


def remove(pages: Pages) -> None:
    """Forget a mapping, which is about to be taken away."""
    del _mappings[pages.address]


@contextlib.contextmanager
def survived() -> Iterator[None]:
    """Within, no bus error in a mapped file ends the process. For any thread; may be nested."""
    if not _IS_SUPPORTED:
        yield
        return
    _installed.enter()
    try:
        yield
    finally:
        _installed.leave()


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Information(ctypes.Structure):
    """The beginning of ``siginfo_t``, for signals of failed memory accesses."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("address", ctypes.c_void_p),
    )


_SA_SIGINFO = 4


class _Installed:
    """The handler of the process, installed as long as somebody is in `survived`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before = _Action()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_Information), ctypes.c_void_p)
        self._callback = kind(self._handle)  # kept: C does not count references

    def enter(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                handler = ctypes.cast(self._callback, ctypes.c_void_p)
                self._set(_Action(handler=handler, flags=_SA_SIGINFO), self._before)

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._set(self._before, None)

    def _set(self, action: _Action, before: _Action | None) -> None:
        call = ctypes.CDLL(None).sigaction
        call(int(signal.SIGBUS), ctypes.byref(action), before and ctypes.byref(before))

    def _handle(self, number: int, information: ctypes._Pointer[_Information], _: object) -> None:
        try:
            if _replace(information.contents.address or 0):
                return
        except BaseException:  # nothing can be raised into what was reading
            pass
        # None of ours: the instruction fails again, and what was there before handles it.
        self._set(self._before, None)


def _replace(address: int) -> bool:
    """Put zeros in the place of what a mapping has from `address` on; return whether one does."""
    for pages in list(_mappings.values()):
        if pages.address <= address < pages.address + pages.size_bytes:
            pages.is_damaged = True  # before anybody can read the zeros
            first = address - address % mmap.PAGESIZE
            libc.map_zeros_over(first, pages.address + pages.size_bytes - first)
            return True
    return False


_installed = _Installed()
