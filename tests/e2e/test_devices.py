"""Every method on every device, whatever its memory: the bytes of the CPU.

What is marked `gpu` needs one; the same runs on torch's CPU device, with fewer dtypes.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from della_dist.config.methods import METHODS
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.gpu.matrices import DeviceMatrix, DeviceProducts
from della_dist.ops.grids import F64Array
from della_dist.ops.tensor import load_backend
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.task.blas import one_blas_thread
from tests.checkpoints import make_experts, save_checkpoint, save_lora, tensor
from tests.every_method import config_of, digests
from tests.merging import run, save_family

MIB = 1 << 20
DTYPES = ("BF16", "F16", "F32", "F64")

#: What may be used of the device, and of the host for slots: one unit of a tensor at a time, which
#: takes more than the share of a lane; a few; all of it.
MEMORY = {
    "large units": (40 * MIB, MIB),
    "chunks": (512 * MIB, 8 * MIB),
    "whole": (4096 * MIB,) * 2,
}

UP = "model.layers.0.mlp.up_proj"

Family = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """A matrix of three units, one of few rows, and a vector, in a dtype."""
    made: dict[str, Family] = {}

    def family(dtype: str) -> Family:
        if dtype not in made:
            rng = np.random.default_rng(3)
            base = {
                f"{UP}.weight": tensor(rng.normal(0, 0.05, (600, 288)), dtype),
                "model.layers.0.self_attn.k_proj.weight": tensor(
                    rng.normal(0, 0.05, (40, 288)), dtype
                ),
                "model.layers.0.norm.weight": tensor(rng.normal(1, 0.05, 288), dtype),
            }
            folder = tmp_path_factory.mktemp(dtype)
            names = ("base", "a", "b", "c")
            models = (base, *make_experts(base, 3))
            paths = [save_checkpoint(folder / n, t) for n, t in zip(names, models, strict=True)]
            made[dtype] = paths[0], paths[1:]
        return made[dtype]

    return family


@pytest.fixture(scope="module")
def compute() -> Iterator[ThreadPoolExecutor]:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_memory_of_the_device(
    method: str, family_of: Callable[[str], Family], compute: ThreadPoolExecutor
) -> None:
    plan = open_plan(config_of(method, *family_of("BF16")))
    memory = MemoryBudget(512 * MIB, 1, 2)
    with one_blas_thread(plan):
        wanted = dict(digests(plan, load_backend("numba"), compute, memory))
        for device, host in MEMORY.values():
            backend = TorchBackend("cpu", gpu_memory=device, host_memory=host)
            assert dict(digests(plan, backend, compute, memory)) == wanted


def test_matrices_are_multiplied_on_the_device_where_they_fit(
    family_of: Callable[[str], Family], compute: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the test above cannot tell."""
    plan = open_plan(config_of("wudi", *family_of("BF16")))
    with one_blas_thread(plan), products_of_devices(monkeypatch) as (added, multiplied):
        for device, host in MEMORY.values():
            added.clear()
            multiplied.clear()
            backend = TorchBackend("cpu", gpu_memory=device, host_memory=host)
            dict(digests(plan, backend, compute, MemoryBudget(512 * MIB, 1, 2)))
            if device < 256 * MIB:
                assert not added
                assert not multiplied
                continue
            # Rows of all experts; columns of all rows of few.
            assert added == {288: 3 * 600, 3 * 40: 288}
            # Of each expert and by the inverse; and once.
            assert multiplied == {(288, 288): 4 * 600, (3 * 40, 288): 40}


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rank", [20, 24])  # of all together less than 64, and more
def test_adapters_are_multiplied_on_the_device(
    rank: int,
    side: str,
    family_of: Callable[[str], Family],
    tmp_path: Path,
    compute: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, rng = family_of("BF16")[0], np.random.default_rng(rank)
    for name in "abc":
        a, b = rng.normal(0, 0.05, (rank, 288)), rng.normal(0, 0.05, (600, rank))
        save_lora(tmp_path / name, {UP: (a, b)}, rank=rank, alpha=rank)
    models = [Path(f"{base}+{tmp_path / name}") for name in "abc"]
    plan = open_plan(config_of("wudi", base, models, parameters={"side": side}))
    memory, backends = MemoryBudget(512 * MIB, 1, 2), (load_backend("numba"), TorchBackend("cpu"))
    with one_blas_thread(plan), products_of_devices(monkeypatch) as (added, multiplied):
        found = [dict(digests(plan, backend, compute, memory)) for backend in backends]
    assert found[0] == found[1]
    assert not added
    assert multiplied == ({} if rank == 20 else {(3 * rank, 288): 600})


def test_a_stack_has_one_matrix_on_the_device_at_a_time(
    tmp_path: Path, compute: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one begins when the last rows of the one before are multiplied."""
    base = {"mlp.experts.w": tensor(np.random.default_rng(0).normal(0, 0.05, (3, 24, 80)), "BF16")}
    base["mlp.experts.high"] = tensor(np.ones((3, 40, 24)), "BF16")
    plan = open_plan(config_of("wudi", *save_family(tmp_path, base)))
    running, seen, lock = list[None](), list[int](), threading.Lock()
    zeros, multiply = DeviceProducts.zeros, DeviceProducts.multiply

    def watched(self: DeviceProducts, num_cols: int) -> DeviceMatrix:
        seen.append(len(running))
        return zeros(self, num_cols)

    def slowly(self: DeviceProducts, grid: F64Array, factor: DeviceMatrix, out: F64Array) -> None:
        with lock:
            running.append(None)
        time.sleep(0.02)
        multiply(self, grid, factor, out)
        with lock:
            running.pop()

    monkeypatch.setattr(DeviceProducts, "zeros", watched)
    monkeypatch.setattr(DeviceProducts, "multiply", slowly)
    with one_blas_thread(plan):
        dict(digests(plan, TorchBackend("cpu"), compute, MemoryBudget(512 * MIB, 1, 2)))
    # Sums of each of three experts, in three matrices; and of all experts' rows, in three.
    assert seen == [0] * (3 * 3 + 3)


@contextlib.contextmanager
def products_of_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Counter[int], Counter[tuple[int, ...]]]]:
    """Count rows that devices multiply: with themselves, by width; by factors, by their shape."""
    added, multiplied = Counter[int](), Counter[tuple[int, ...]]()
    add, multiply, lock = DeviceProducts.add_square, DeviceProducts.multiply, threading.Lock()

    def counted_add(self: DeviceProducts, total: DeviceMatrix, grid_rC: F64Array) -> None:
        with lock:
            added[grid_rC.shape[1]] += len(grid_rC)
        add(self, total, grid_rC)

    def counted(self: DeviceProducts, grid: F64Array, factor: DeviceMatrix, out: F64Array) -> None:
        with lock:
            multiplied[tuple(factor.matrix_KC.shape)] += len(grid)
        multiply(self, grid, factor, out)

    with monkeypatch.context() as patched:
        patched.setattr(DeviceProducts, "add_square", counted_add)
        patched.setattr(DeviceProducts, "multiply", counted)
        yield added, multiplied


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(
    method: str, dtype: str, family_of: Callable[[str], Family], tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = config_of(method, *family_of(dtype))
    wanted = run(config, tmp_path / "cpu").model_digest
    options: list[dict[str, Any]] = [{}, {"gpu_memory": 128 * MIB}, {"threads": 6}]
    for number, given in enumerate(options):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        summary = run(config, tmp_path / str(number), device="cuda", **given)
        assert summary.model_digest == wanted
        if "gpu_memory" in given:
            assert torch.cuda.max_memory_reserved() <= given["gpu_memory"]
