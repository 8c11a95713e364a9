"""BLAS with one thread, so that no number of them shows in what is multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from threadpoolctl import threadpool_limits

from della_dist.planning.build import MergePlan


@contextlib.contextmanager
def one_blas_thread(plan: MergePlan) -> Iterator[None]:
    """While a plan is run that multiplies matrices, keep BLAS to the thread that calls it.

    Tasks have threads of their own; sums that BLAS divides among its own hang on their number.
    """
    if plan.adapter is None:
        yield
        return
    with threadpool_limits(1, "blas"):
        yield
