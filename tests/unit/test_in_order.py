"""Results in the order in which they were asked for, a bounded number at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from della_dist.runtime.task.in_order import in_order


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_order_and_bound(limit: int) -> None:
    submitted = taken = most = 0

    def submit(pool: ThreadPoolExecutor) -> Iterator[Future[int]]:
        nonlocal submitted, most
        for number in range(20):
            submitted += 1
            most = max(most, submitted - taken)
            yield pool.submit(int, number)

    with ThreadPoolExecutor(3) as pool:
        for number in in_order(submit(pool), limit):
            assert number == taken
            taken += 1
    assert taken == 20
    assert most == min(limit, 20)


def test_the_first_error_in_order() -> None:
    def fail(number: int) -> int:
        if number % 2:
            raise ValueError(str(number))
        return number

    with ThreadPoolExecutor(4) as pool:
        results = in_order((pool.submit(fail, n) for n in range(8)), 4)
        assert next(results) == 0
        with pytest.raises(ValueError, match="1"):
            next(results)
