"""The GPU beside the CPU: throughput and digest of every method, copies, products of matrices.

Run ``python -m tests.bench gpu`` on a machine with a CUDA device, or ``python -m
tests.bench.bench_gpu [--device cpu]`` with more options: torch's CPU device stands for one then,
which shows that everything runs and nothing about speed. Inputs are read from the page cache, and
outputs are hashed, not written. Ends with status 1 where a digest is another one than the CPU's.

Methods whose singular values LAPACK finds (`iso_c`, `tsv`) take the same time on any device and are
left out; ``pytest -m gpu`` has their bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from della_dist.config.methods import METHODS
from della_dist.ops.blocks import Backend
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.grids import F64Array
from della_dist.ops.tensor import load_backend
from della_dist.planning.memory import MemoryBudget
from della_dist.report.text import parse_size
from della_dist.runtime.budget import available_cores
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.task.backend import STAGING_SHARE
from della_dist.runtime.task.blas import one_blas_thread
from della_dist.specs.reading import bytes_to_read
from tests.checkpoints import save_checkpoint, tensor
from tests.every_method import config_of, digests

#: What is measured: not what LAPACK does on the CPU anyway.
TIMED = tuple(name for name, method in METHODS.items() if not method.is_decomposed)


@dataclass(frozen=True)
class Copies:
    """Between pinned memory and the device, one direction at a time."""

    up_gb_per_s: float
    down_gb_per_s: float


@dataclass(frozen=True)
class Products:
    """Of matrices on the device, by the way of a merge and by torch alone, in float64."""

    what: str
    rows: int
    cols: int
    gflop_per_s: float
    bare_gflop_per_s: float


@dataclass(frozen=True)
class Merged:
    """One method: million expert-elements a second, and what the device is sent."""

    method: str
    cpu_m_per_s: float
    device_m_per_s: float
    device_gb_per_s: float
    """Bytes read, all passes, by the time of the device."""
    is_equal: bool


@dataclass(frozen=True)
class Reserved:
    """Device memory that torch had at the peak."""

    bytes: int
    allowed_bytes: int


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object], rounds: int) -> float:
    """Return the shortest time of several; once more before, to warm up."""
    best = float("inf")
    for number in range(rounds + 1):
        wait_for(device)
        before = time.perf_counter()
        run()
        wait_for(device)
        if number:
            best = min(best, time.perf_counter() - before)
    return best


def copies(device: torch.device, num_bytes: int, rounds: int) -> Copies:
    """Measure copies of so many bytes."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    up = seconds(device, lambda: there.copy_(host, non_blocking=True), rounds)
    down = seconds(device, lambda: host.copy_(there, non_blocking=True), rounds)
    return Copies(num_bytes / up / 1e9, num_bytes / down / 1e9)


def products(backend: TorchBackend, rows: int, cols: int, rounds: int) -> Iterator[Products]:
    """Measure what `wudi` multiplies: rows with themselves, and with a square matrix.

    And in its dual form, of half as many rows: each with all others, and a square matrix with them.
    """
    device, on_device = backend.device, backend.products("products")
    random = np.random.default_rng(0)
    grid = random.integers(-(1 << 17), 1 << 17, (rows, cols)).astype(np.float64)
    square = random.integers(-(1 << 17), 1 << 17, (cols, cols)).astype(np.float64)
    few = grid[: min(rows, cols) // 2]
    left = square[: len(few), : len(few)]
    there, square_there = torch.from_numpy(grid).to(device), torch.from_numpy(square).to(device)
    few_there, left_there = there[: len(few)], square_there[: len(few), : len(few)]
    total, held, few_held = on_device.zeros(cols), on_device.hold(square), on_device.hold(few)
    out, few_out = np.empty_like(grid), np.empty_like(few)

    def measured(
        what: str, of: F64Array, terms: int, ours: Callable[[], object], bare: Callable[[], object]
    ) -> Products:
        ours_s, bare_s = (seconds(device, run, rounds) for run in (ours, bare))
        operations, (num_rows, num_cols) = 2e-9 * of.size * terms, of.shape
        return Products(what, num_rows, num_cols, operations / ours_s, operations / bare_s)

    def add() -> None:
        on_device.add_square(total, grid)

    def multiply() -> None:
        on_device.multiply(grid, held, out)

    def multiply_few() -> None:
        on_device.multiply(left, few_held, few_out)

    yield measured("gram", grid, cols, add, lambda: there.T @ there)
    yield measured("rows", grid, cols, multiply, lambda: there @ square_there)
    with ThreadPoolExecutor(available_cores()) as pool:
        bare = partial(torch.matmul, few_there, few_there.T)
        yield measured("dual gram", few, len(few), lambda: on_device.gram(few, pool), bare)
    yield measured("dual rows", few, len(few), multiply_few, lambda: left_there @ few_there)
    for made, wanted in ((out, there @ square_there), (few_out, left_there @ few_there)):
        if not np.array_equal(made, wanted.cpu().numpy()):
            raise AssertionError("products on the device are not those of torch")


def save_models(folder: Path, elements: int, cols: int) -> tuple[Path, list[Path]]:
    """Write a base and three experts in bf16: matrices of `cols` x `cols`, one at least."""
    paths = []
    for number, name in enumerate(("base", "a", "b", "c")):
        model = {}
        for layer in range(max(1, elements // cols**2)):
            base = np.random.default_rng(layer).standard_normal(cols * cols, np.float32) * 0.02
            if number:
                random = np.random.default_rng([layer, number])
                base += random.standard_t(4, cols * cols).astype(np.float32) * 5e-4
            values = base.reshape(cols, cols)
            model[f"model.layers.{layer}.mlp.down_proj.weight"] = tensor(values, "BF16")
        paths.append(save_checkpoint(folder / name, model, config={"model_type": "llama"}))
    return paths[0], paths[1:]


def merged(
    method: str,
    models: tuple[Path, list[Path]],
    backends: Sequence[Backend],
    memory: MemoryBudget,
    rounds: int,
) -> Merged:
    """Merge by one method on the CPU and on a device."""
    plan = open_plan(config_of(method, *models))
    found: list[dict[str, str]] = []
    best = []
    with one_blas_thread(plan), ThreadPoolExecutor(memory.threads) as compute:
        for backend in backends:
            times = []
            for _ in range(rounds + 1):
                before = time.perf_counter()
                made = dict(digests(plan, backend, compute, memory))
                times.append(time.perf_counter() - before)
            found.append(made)
            best.append(min(times[1:]))
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    read = sum(bytes_to_read(plan.source(tensor))[0] for tensor in tensors)
    rates = [plan.expert_elements / s / 1e6 for s in best]
    return Merged(method, rates[0], rates[1], read / best[1] / 1e9, found[0] == found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--methods", nargs="+", choices=TIMED, default=TIMED, metavar="NAME")
    parser.add_argument("--million", type=float, default=256, help="parameters of a model")
    parser.add_argument("--cols", type=int, default=4096, help="of each matrix, and its rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy", type=parse_size, default=1 << 30, help="bytes of a copy")
    parser.add_argument("--memory", type=parse_size, default=8 << 30)
    parser.add_argument("--gpu-memory", type=parse_size)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--scratch", type=Path, help="folder for the models (8 bytes a parameter)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--device cpu runs it all the same)")
        return 0

    def report(kind: str, line: str, measured: Any) -> None:
        whole = {"kind": kind, "device": options.device, **asdict(measured)}
        print(json.dumps(whole) if options.json else line, flush=True)

    memory = MemoryBudget(options.memory, 1, options.threads)
    host_memory = memory.block_mem // STAGING_SHARE
    backend = TorchBackend(options.device, gpu_memory=options.gpu_memory, host_memory=host_memory)
    limit = copies(backend.device, options.copy, options.rounds)
    line = f"copies: {limit.up_gb_per_s:.1f} GB/s up, {limit.down_gb_per_s:.1f} GB/s down"
    report("copies", line, limit)
    for made in products(backend, options.cols, options.cols, options.rounds):
        share = made.gflop_per_s / made.bare_gflop_per_s
        line = (
            f"{made.what}, {made.rows} x {made.cols}: {made.gflop_per_s:.0f} GFLOP/s, "
            f"{share:.2f} of torch.matmul's {made.bare_gflop_per_s:.0f}"
        )
        report("products", line, made)
    if options.device == "cuda":  # of what was multiplied by torch alone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    is_equal = True
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        models = save_models(Path(folder), int(options.million * 1e6), options.cols)
        backends = load_backend("numba"), backend
        for method in options.methods:
            one = merged(method, models, backends, memory, options.rounds)
            is_equal &= one.is_equal
            line = (
                f"{method:17} CPU {one.cpu_m_per_s:7.0f} M/s, {options.device} "
                f"{one.device_m_per_s:7.0f} M/s, {one.device_gb_per_s:6.2f} GB/s "
                f"({one.device_gb_per_s / limit.up_gb_per_s:.2f} of copies), "
                f"{'same digest' if one.is_equal else 'ANOTHER DIGEST'}"
            )
            report("merged", line, one)
    if options.device == "cuda":
        peak = Reserved(torch.cuda.max_memory_reserved(), backend.device_memory)
        line = f"memory: {peak.bytes >> 20} MiB at the peak, {peak.allowed_bytes >> 20} allowed"
        report("memory", line, peak)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
