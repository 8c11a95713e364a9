"""Results of work on other threads, in the order in which it was given out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_order(submitted: Iterable[Future[T]], limit: int) -> Iterator[T]:
    """Yield the result of every future, with at most `limit` of them submitted and not taken.

    Parameters
    ----------
    submitted
        Submits as it is drawn from.
    limit
        At least 1. What is in flight is what bounds the memory.
    """
    pending: deque[Future[T]] = deque()
    for future in submitted:
        pending.append(future)
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
