"""Matrices are merged at the same time where memory holds all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from della_dist.runtime.task.room import Room


def going_on() -> None:
    """Nothing was cancelled."""


class Visits:
    """Threads that enter a room and stay until they are told to leave."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._pool = ThreadPoolExecutor(4)

    def enter(
        self, own_mem: int | None, most: int, check: Callable[[], None] = going_on
    ) -> tuple[threading.Event, threading.Event, Future[None]]:
        """Return what says that it is inside, what sends it out, and its end."""
        inside, leave = threading.Event(), threading.Event()

        def visit() -> None:
            with self._room.taken(own_mem, most, check):
                inside.set()
                assert leave.wait(10)

        return inside, leave, self._pool.submit(visit)


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ((40, 100), (60, 100), True),
        ((40, 100), (61, 100), False),
        ((40, 90), (60, 100), False),  # the first knows of less room
        ((40, 100), (60, 90), False),
        ((None, 100), (1, 100), False),
        ((1, 100), (None, 100), False),
        ((200, 100), (1, 100), False),  # too large for any: it is there alone
    ],
)
def test_who_is_inside_together(
    first: tuple[int | None, int], second: tuple[int | None, int], fits: bool
) -> None:
    visits = Visits(Room())
    inside, leave, end = visits.enter(*first)
    assert inside.wait(10)
    also, leave_too, end_too = visits.enter(*second)
    assert also.wait(10 if fits else 0.05) == fits
    leave.set()
    end.result(10)
    assert also.wait(10)
    leave_too.set()
    end_too.result(10)


def test_who_waits_hears_that_the_run_is_over() -> None:
    visits = Visits(Room())
    inside, leave, end = visits.enter(1, 1)
    assert inside.wait(10)

    def over() -> None:
        raise RuntimeError("over")

    _, _, waiting = visits.enter(1, 1, over)
    with pytest.raises(RuntimeError, match="over"):
        waiting.result(10)
    leave.set()
    end.result(10)
    # Nothing of it is left inside.
    inside, leave, end = visits.enter(1, 1)
    assert inside.wait(10)
    leave.set()
    end.result(10)
