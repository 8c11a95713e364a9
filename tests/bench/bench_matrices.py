"""Methods on whole matrices: what they take, and how fast their products are beside BLAS's own.

The family of `bench_merge` by WUDI, in this process: seconds beside those of task arithmetic, and
the GFLOP/s of its products of integers while it runs, by processor time of the threads, beside
those of bare products of the same shapes on as many threads. Then one matrix of 2048 x 2048 by
every such method, by processor time::

    python -m tests.bench.bench_matrices [--rounds 3]
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import yaml

import della_dist
from della_dist.config.methods import METHODS
from della_dist.demo import make_family
from della_dist.ops.exact_products import HostProducts
from della_dist.ops.grids import F64Array
from della_dist.runtime.budget import available_cores
from della_dist.runtime.task.blas import few_blas_threads
from tests.bench.bench_merge import FAMILY
from tests.bench.in_turn import in_scratch, parser
from tests.checkpoints import make_experts, save_checkpoint, tensor

#: Whether a product is a square of rows with themselves, its rows, terms of each sum or 0, columns.
Kind: TypeAlias = tuple[bool, int, int, int]


@dataclass
class Spent:
    """Products of one kind."""

    count: int = 0
    cpu_s: float = 0.0


def operations(kind: Kind) -> int:
    """Return how many multiplications and additions a product needs."""
    is_square, rows, terms, cols = kind
    return rows * cols * (cols + 1) if is_square else 2 * rows * terms * cols


@contextmanager
def watched() -> Iterator[dict[Kind, Spent]]:
    """Count the products that are made, and the processor time of the threads that make them.

    Without the products of few rows with one another, which are shared out among threads.
    """
    found: dict[Kind, Spent] = defaultdict(Spent)
    lock = threading.Lock()

    def timing(name: str) -> Any:
        made = getattr(HostProducts, name)

        def run(self: HostProducts, *args: Any) -> None:
            kind = (True, len(args[1]), 0, args[1].shape[1])
            if name == "multiply":
                kind = (False, *args[0].shape, args[1].shape[1])
            started_s = time.thread_time()
            made(self, *args)
            spent_s = time.thread_time() - started_s
            with lock:
                one = found[kind]
                one.count, one.cpu_s = one.count + 1, one.cpu_s + spent_s

        return patch.object(HostProducts, name, run)

    with timing("add_square"), timing("multiply"):
        yield found


def bare_seconds(kind: Kind, threads: int, seconds: float = 0.5) -> float:
    """Return the processor time of one such product by BLAS, while other threads do the same."""
    is_square, rows, terms, cols = kind
    found: list[float] = []

    def run() -> None:
        rng = np.random.default_rng(0)
        grid = rng.integers(-1000, 1000, (rows, terms or cols)).astype(np.float64)
        other_KC = rng.integers(-1000, 1000, (terms, cols)).astype(np.float64)
        out: F64Array = np.empty((cols, cols) if is_square else (rows, cols))
        left, right = (grid.T, grid) if is_square else (grid, other_KC)
        np.matmul(left, right, out=out)
        started_s, count, end_s = time.thread_time(), 0, time.monotonic() + seconds
        while not count or time.monotonic() < end_s:
            np.matmul(left, right, out=out)
            count += 1
        found.append((time.thread_time() - started_s) / count)

    with few_blas_threads():
        running = [threading.Thread(target=run) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return statistics.mean(found)


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, 2.5).parse_args()
    in_scratch(options, lambda folder: bench(folder, options.rounds))


def bench(folder: Path, rounds: int) -> None:
    """Merge and print."""
    family = make_family(folder / "family", **FAMILY)
    content = yaml.safe_load(family.config_path.read_text())
    base, models = content["base_model"], [one["model"] for one in content["models"]]
    run = partial(merged, folder, base, models)
    run("task_arithmetic")
    seconds: dict[str, list[float]] = {"task_arithmetic": [], "wudi": []}
    for _ in range(rounds):
        for method, found in seconds.items():
            with watched() as products:
                found.append(timed(time.monotonic, partial(run, method)))
    for method, found in seconds.items():
        print(f"{method:16} {statistics.median(found):6.2f} s  {[round(s, 2) for s in found]}")
    show_products(products)
    save_matrices(folder)
    base, models = str(folder / "base"), [str(folder / f"expert{m}") for m in range(3)]
    run = partial(merged, folder, base, models)
    print("2048 x 2048, CPU seconds:")
    for method in ("task_arithmetic", *(n for n, one in METHODS.items() if one.is_balanced)):
        run(method)
        found = [timed(time.process_time, partial(run, method)) for _ in range(rounds)]
        print(f"{method:16} {statistics.median(found):6.2f} s  {[round(s, 2) for s in found]}")


def show_products(products: dict[Kind, Spent]) -> None:
    """Print the GFLOP/s of every kind of product, as it was merged and bare."""
    threads = available_cores()
    all_operations, all_s, all_bare_s = 0, 0.0, 0.0
    for kind, spent in sorted(products.items()):
        is_square, rows, terms, cols = kind
        total = operations(kind) * spent.count
        bare_s = bare_seconds(kind, threads) * spent.count
        all_operations += total
        all_s += spent.cpu_s
        all_bare_s += bare_s
        what = f"q' q of {rows:5} x {cols:5}        "
        if not is_square:
            what = f"q G of {rows:5} x {terms:5} x {cols:5} "
        print(
            f"{what}: {spent.count:6} times, {spent.cpu_s:6.1f} s of CPU, "
            f"{total / spent.cpu_s / 1e9:5.1f} GFLOP/s a thread, bare {total / bare_s / 1e9:5.1f}"
        )
    print(
        f"all: {all_operations:.2e} operations in {all_s:.1f} s of CPU, "
        f"{all_operations / all_s / 1e9:.1f} GFLOP/s a thread, "
        f"{all_bare_s / all_s:.2f} of BLAS's {all_operations / all_bare_s / 1e9:.1f}"
    )


def save_matrices(folder: Path) -> None:
    """Write a base of one matrix in bf16, and three experts of it."""
    numbers = np.random.default_rng(0).normal(0, 0.02, (2048, 2048))
    base = {"model.layers.0.mlp.up_proj.weight": tensor(numbers, "BF16")}
    save_checkpoint(folder / "base", base)
    for m, expert in enumerate(make_experts(base, 3)):
        save_checkpoint(folder / f"expert{m}", expert)


def merged(folder: Path, base: str, models: list[str], method: str) -> None:
    """Merge by a method."""
    config = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model} for model in models],
        "dtype": "bfloat16",
    }
    options = della_dist.RunOptions(restart=True, check=False)
    della_dist.merge(config, folder / "out", options=options)


def timed(clock: Callable[[], float], run: Callable[[], object]) -> float:
    """Return the seconds of a run."""
    started_s = clock()
    run()
    return clock() - started_s


if __name__ == "__main__":
    main()
