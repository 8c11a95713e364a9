"""Room for matrices that are merged as a whole: several at a time, where memory holds them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

#: What one takes, and what all may.
_Taken: TypeAlias = tuple[int | None, int]

#: How often a worker that waits looks whether the run goes on.
_LOOK_S = 0.2


class Room:
    """What the workers of a process have for such matrices."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[_Taken] = []

    @contextlib.contextmanager
    def taken(self, own_mem: int | None, most: int, check: Callable[[], None]) -> Iterator[None]:
        """Wait until there is room, and keep it; whoever finds nobody inside enters anyhow.

        Parameters
        ----------
        own_mem
            Bytes that this matrix takes beside the others; None if it is merged alone.
        most
            Bytes that all who are inside may take, as far as this one knows.
        check
            Raises if nobody need wait any more.
        """
        me = (own_mem, most)
        with self._changed:
            while self._inside and not _fit([*self._inside, me]):
                check()
                self._changed.wait(_LOOK_S)
            self._inside.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                self._changed.notify_all()


def _fit(inside: list[_Taken]) -> bool:
    needs = [own for own, _ in inside if own is not None]
    return len(needs) == len(inside) and sum(needs) <= min(most for _, most in inside)
