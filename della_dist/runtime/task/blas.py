"""BLAS with one thread, so that no number of them shows in what is multiplied; and which it is."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from della_dist.planning.build import MergePlan


@contextlib.contextmanager
def one_blas_thread(plan: MergePlan) -> Iterator[None]:
    """While a plan is run that multiplies matrices, keep BLAS to the thread that calls it.

    Tasks have threads of their own; sums that BLAS divides among its own hang on their number.
    """
    if plan.adapter is None and not plan.config.method.is_balanced:
        yield
        return
    with threadpool_limits(1, "blas"):
        yield


@contextlib.contextmanager
def few_blas_threads() -> Iterator[None]:
    """Keep BLAS to the thread that calls it, where the system tells which libraries are loaded.

    For figures that are rounded: of last digits, `one_blas_thread` makes sure.
    """
    try:
        limits: contextlib.AbstractContextManager[object] = threadpool_limits(1, "blas")
    except OSError:  # a Linux without /proc
        limits = contextlib.nullcontext()
    with limits:
        yield


def arithmetic() -> dict[str, str]:
    """Return what the last digits of singular values hang on: libraries, and the processor's kind.

    Of this process. Workers on other machines compare theirs with the driver's, in the plan.
    """
    found = np.show_config(mode="dicts")
    assert isinstance(found, dict)
    lapack = found["Build Dependencies"]["lapack"]
    features = found.get("SIMD Extensions", {}).get("found", [])
    libraries = [one for one in threadpool_info() if one["user_api"] == "blas"]
    own = [one for one in libraries if "numpy" in one["filepath"]] or libraries
    kernels = [str(one["architecture"]) for one in own[:1] if one.get("architecture")]
    return {
        "numpy": np.__version__,
        "lapack": f"{lapack['name']} {lapack['version']}",
        "processor": " ".join([platform.machine(), *features, *kernels]),
    }
