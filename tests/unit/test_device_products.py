"""Products of integers on a device: those of numpy, however rows are cut and whoever adds them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from della_dist.ops.exact_products import HostProducts, Products
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.gpu.matrices import DeviceProducts
from della_dist.ops.gpu.staging import HostQueue, Queue, Staging
from della_dist.ops.grids import F64Array
from della_dist.ops.wudi import Wudi
from della_dist.specs.recipe import Balance, MergeSettings
from tests.late_queue import LateQueue
from tests.unit.test_wudi import deltas
from tests.unit.test_wudi_dual import dual, how, low_rank, term

CPU = torch.device("cpu")
QUEUES = (HostQueue, LateQueue)


def on_device(slot_bytes: int, queue: Callable[[torch.device], Queue]) -> DeviceProducts:
    torch.set_num_threads(1)
    return DeviceProducts(Staging(CPU, 2, slot_bytes, queue), CPU, "w")


def integers(rows: int, cols: int, bits: int) -> F64Array:
    random = np.random.default_rng([rows, cols, bits])
    return random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, cols)).astype(np.float64)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("slot_bytes", [256, 4096, 1 << 20])  # less than a row, some rows, all
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (50, 37), (7, 64)])
def test_products(
    rows: int, cols: int, slot_bytes: int, queue: Callable[[torch.device], Queue]
) -> None:
    products = on_device(slot_bytes, queue)
    total, square = products.zeros(cols), np.zeros((cols, cols))
    for seed in range(3):
        grid_rC = integers(rows, cols, 18 - seed)
        products.add_square(total, grid_rC)
        square += grid_rC.T @ grid_rC
    assert np.array_equal(products.fetch(total), square)
    factor = integers(cols, cols, 22)
    held, out_rC = products.hold(factor), np.full((rows, cols), np.nan)
    products.multiply(grid_rC, held, out_rC)
    assert np.array_equal(out_rC, grid_rC @ factor)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("slot_bytes", [256, 4096, 1 << 20])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (70, 37), (7, 150)])
def test_products_of_other_shapes(
    rows: int, cols: int, slot_bytes: int, queue: Callable[[torch.device], Queue]
) -> None:
    """Of rows with one another, and with what is no square; of transposes, which lie otherwise."""
    products, grid_NC, left_rN = (
        on_device(slot_bytes, queue), integers(rows, cols, 18), integers(45, rows, 17)
    )  # fmt: skip
    for num_threads in (1, 5):
        with ThreadPoolExecutor(num_threads) as pool:
            assert np.array_equal(products.gram(grid_NC, pool), grid_NC @ grid_NC.T)
    for left, right in ((left_rN, grid_NC), (grid_NC.T, left_rN.T)):
        out = np.full((len(left), right.shape[1]), np.nan)
        products.multiply(left, products.hold(right), out)
        assert np.array_equal(out, left @ right)


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    """Of widths that libraries multiply otherwise than small ones."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    products = TorchBackend("cuda").products("w")
    for rows, cols in ((1, 1), (700, 1000), (4096, 2048)):
        grids = [integers(rows, cols, bits) for bits in (18, 17, 16)]
        total, square = products.zeros(cols), sum(grid.T @ grid for grid in grids)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(partial(products.add_square, total), grids))
        assert np.array_equal(products.fetch(total), square)
        factor = integers(cols, cols, 22)
        held, out_rC = products.hold(factor), np.empty((rows, cols))
        products.multiply(grids[0], held, out_rC)
        assert np.array_equal(out_rC, grids[0] @ factor)
        with ThreadPoolExecutor(3) as pool:
            assert np.array_equal(products.gram(grids[0], pool), grids[0] @ grids[0].T)
        out_Cr = np.empty((cols, rows))
        products.multiply(factor, products.hold(grids[1].T), out_Cr)
        assert np.array_equal(out_Cr, factor @ grids[1].T)


@pytest.mark.parametrize("queue", QUEUES)
def test_threads_add_to_one_sum(queue: Callable[[torch.device], Queue]) -> None:
    products, grids = on_device(2048, queue), [integers(40, 16, bits) for bits in range(4, 18)]
    total = products.zeros(16)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda grid: products.add_square(total, grid), grids))
    assert np.array_equal(products.fetch(total), sum(grid.T @ grid for grid in grids))


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25), (1.0, 0.0, 0.3), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("rank", [1, 40])  # of one direction rounding would be amplified
def test_a_matrix_on_the_device(weights: tuple[float, ...], rank: int) -> None:
    """Sums stay there while rows are looked at, and factors while they are merged."""
    random = np.random.default_rng(1)
    deltas = [
        (random.normal(0, 1e-3, (90, rank)) @ random.normal(0, 1, (rank, 40))).astype(np.float32)
        for _ in weights
    ]
    settings: Any = MergeSettings(weights=weights, balance=Balance("wudi"), elect=False)
    made = []
    choices: tuple[Products, ...] = (HostProducts(), on_device(4096, LateQueue))
    with ThreadPoolExecutor(3) as pool:
        for products in choices:
            largest = [float(np.abs(delta).max()) for delta in deltas]
            rule = Wudi(settings, how("primal", (90, 40), 3, 270), largest, products)
            steps = [[delta[i : i + 13] for delta in deltas] for i in range(0, 90, 13)]
            list(pool.map(rule.look, steps))
            rule.solve(pool)
            made.append(np.concatenate([rule.merged(step).copy() for step in steps]))
    assert np.array_equal(made[0], made[1])
    assert made[0].any() == any(weights)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("slot_bytes", [256, 8192, 1 << 20])
def test_forms_of_few_rows_on_the_device(slot_bytes: int, is_turned: bool) -> None:
    """Rows with one another and the merged delta of the dual form; of adapters the latter."""
    given, weights = deltas(40, 170, 3), (1.0, 0.0, 1.7)
    experts = [[term(90, 110, rank, rank)] for rank in (30, 1, 7)]
    choices: list[tuple[Products, int]] = [(HostProducts(), 1), (HostProducts(), 3)]
    choices += [(on_device(slot_bytes, queue), 3) for queue in QUEUES]
    made = []
    for products, num_threads in choices:
        with ThreadPoolExecutor(num_threads) as pool:
            cut: dict[str, Any] = {"is_turned": is_turned, "products": products}
            two = (
                dual(given, weights, pool, step=13, **cut),
                low_rank(experts, (90, 110), weights, pool, **cut),
            )
        made.append([None if one is None else one.tobytes() for one in two])
    assert None not in made[0]
    assert made == [made[0]] * len(choices)
