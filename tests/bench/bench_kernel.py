"""Throughput of the Numba kernels, in million expert-elements a second.

Run ``python tests/bench/bench_kernel.py [--json] [--seconds S]``. Data are like those of
fine-tuned models: a base of N(0, 0.02), heavy-tailed deltas of about 7e-4, every checkpoint
rounded to its dtype. The best of many runs is reported: other work on the machine only slows down.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import Block, U8Array
from della_dist.ops.cpu.backend import NumbaBackend
from della_dist.ops.measurements import merge_measurements
from della_dist.ops.prepare import Ready, absorb, prepare
from della_dist.specs.dtypes import DTYPE_BITS
from della_dist.specs.recipe import Angles, MergeSettings, Overlap, TensorRecipe

NUM_EXPERTS = 3
NUM_ELEMENTS = 1 << 20

DELLA = MergeSettings(
    weights=(1.0, 0.7, 0.5),
    densities=(0.5,) * NUM_EXPERTS,
    epsilons=(0.1,) * NUM_EXPERTS,
)
_NO_EPSILON = (0.0,) * NUM_EXPERTS
TASK_ARITHMETIC = replace(
    DELLA,
    drop="none",
    elect=False,
    rescale="none",
    normalize=False,
    densities=(1.0,) * NUM_EXPERTS,
    epsilons=_NO_EPSILON,
)
#: Of methods of one expert.
PLAIN: dict[str, Any] = {"drop": "none", "elect": False, "rescale": "none", "normalize": False}
METHODS = {
    "della": DELLA,
    "della l1": replace(DELLA, rescale="l1"),
    "dare_ties": replace(DELLA, drop="random", epsilons=_NO_EPSILON),
    "ties": replace(DELLA, drop="magnitude", rescale="none", epsilons=_NO_EPSILON),
    "breadcrumbs_ties": replace(
        DELLA,
        drop="outliers",
        rescale="none",
        epsilons=_NO_EPSILON,
        gammas=(0.01,) * NUM_EXPERTS,
    ),
    "sce": replace(DELLA, drop="variance", rescale="none", by_energy=True, epsilons=_NO_EPSILON),
    "ramplus_tl": replace(TASK_ARITHMETIC, drop="threshold", least=1e-5, overlap=Overlap(0.1, 0.2)),
    "nearswap": MergeSettings(weights=(1.0,), limit=1e-4, **PLAIN),
    "arcee_fusion": MergeSettings(weights=(1.0,), **{**PLAIN, "drop": "importance"}),
    "task_arithmetic": TASK_ARITHMETIC,
    "model_stock": replace(TASK_ARITHMETIC, angles=Angles(rule="model_stock")),
    "model_stock rows": replace(TASK_ARITHMETIC, angles=Angles(rule="model_stock", by_row=True)),
}


@dataclass(frozen=True)
class Case:
    """One line of the report."""

    method: str
    dtype: str
    cols: int
    threads: int


def cases() -> Iterator[Case]:
    """Yield what is measured, the most important first."""
    for cols in (1024, 4096, 16384):
        for threads in (1, 2):
            yield Case("della", "BF16", cols, threads)
    for dtype in ("F16", "F32", "F64"):
        for cols in (1024, 4096, 16384):
            yield Case("della", dtype, cols, 2)
    for cols in (1, 4, 16, 64, 128, 256, 262_144):
        yield Case("della", "BF16", cols, 2)
    for method in METHODS:
        if method != "della":
            yield Case(method, "BF16", 4096, 2)


def to_raw(values: npt.NDArray[np.float64], dtype: str) -> U8Array:
    """Return the bytes of `values` rounded to `dtype`."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
        return np.frombuffer(rounded.astype(np.uint16).tobytes(), np.uint8)
    return np.frombuffer(values.astype(f"<f{DTYPE_BITS[dtype] // 8}").tobytes(), np.uint8)


@functools.cache
def checkpoints(dtype: str) -> tuple[U8Array, tuple[U8Array, ...]]:
    """Return the bytes of a base and its experts, `NUM_ELEMENTS` each."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, NUM_ELEMENTS)
    experts = (base + rng.standard_t(4, NUM_ELEMENTS) * 5e-4 for _ in range(NUM_EXPERTS))
    return to_raw(base, dtype), tuple(to_raw(expert, dtype) for expert in experts)


def best_seconds(run: Callable[[], Any], threads: int, seconds: float) -> float:
    """Return the shortest time in which `threads` threads have each called `run` once."""
    run()
    best = float("inf")
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        workers = [threading.Thread(target=run) for _ in range(threads - 1)]
        before = time.perf_counter()
        for worker in workers:
            worker.start()
        run()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - before)
    return best


def measure(case: Case, seconds: float) -> float:
    """Return the million expert-elements a second of one case, all passes together."""
    backend = NumbaBackend()
    base, experts = checkpoints(case.dtype)
    count = len(METHODS[case.method].weights)
    experts, dtypes = experts[:count], (case.dtype,) * count
    shape = (NUM_ELEMENTS // case.cols, case.cols)
    recipe = TensorRecipe("t", shape, case.dtype, dtypes, case.dtype, METHODS[case.method])
    block = Block(0, NUM_ELEMENTS, base, experts)
    local = threading.local()

    def run() -> None:
        out = getattr(local, "out", None)
        if out is None:
            out = local.out = np.empty_like(base)
        prepared = prepare(recipe)
        while not isinstance(prepared, Ready):
            total = functools.reduce(merge_measurements, [backend.measure(recipe, prepared, block)])
            prepared = absorb(recipe, prepared, total)
        backend.merge(recipe, prepared, block, out)

    elapsed = best_seconds(run, case.threads, seconds)
    return case.threads * count * NUM_ELEMENTS / elapsed / 1e6


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds to spend a case")
    arguments = parser.parse_args()
    for case in cases():
        speed = measure(case, arguments.seconds)
        if arguments.json:
            line = {**vars(case), "m_expert_elements_per_s": round(speed, 1)}
            sys.stdout.write(json.dumps(line) + "\n")
        else:
            sys.stdout.write(
                f"{case.method:16} {case.dtype:5} {case.cols:7} columns {case.threads} threads "
                f"{speed:8.0f} M/s\n"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
