"""Rows that are formed of others, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from della_dist.ops.cpu.low_rank import TILE_COLS
from della_dist.ops.forming import add_low_rank, converted, difference, mean, mean_row
from tests.checkpoints import tensor

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WIDER = [("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")]


def raw(values: torch.Tensor) -> np.typing.NDArray[np.uint8]:
    return np.asarray(values.contiguous().view(torch.uint8).numpy()).reshape(-1)


def numbers(dtype: str, count: int, step: float) -> torch.Tensor:
    values = torch.sin(torch.arange(count, dtype=torch.float64) * step) * 10
    return values.to(DTYPES[dtype])


@pytest.mark.parametrize(("dtype", "to"), [*WIDER, *((d, d) for d in DTYPES)])
def test_converted(dtype: str, to: str) -> None:
    values = numbers(dtype, 1000, 0.7)
    values[:3] = torch.tensor([float("nan"), float("inf"), 1e-7])
    expected = values.to(DTYPES[to])
    found = torch.from_numpy(converted(raw(values), dtype, to).copy()).view(DTYPES[to])
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("dtypes", "to"),
    [("BF16 BF16 BF16", "BF16"), ("F16 F16", "F16"), ("F32 BF16 F16", "F32"), ("F64 F32", "F64")],
)
def test_mean(dtypes: str, to: str) -> None:
    columns = [numbers(d, 500, 0.3 + i) for i, d in enumerate(dtypes.split())]
    compute = torch.float64 if "F64" in dtypes else torch.float32
    total = columns[0].to(compute)
    for column in columns[1:]:
        total = total + column.to(compute)
    expected = (total / len(columns)).to(DTYPES[to])
    assert np.array_equal(mean([raw(c) for c in columns], dtypes.split(), to), raw(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8])
def test_mean_row(dtype: str, size: int) -> None:
    rows = numbers(dtype, 300 * size, 0.9).reshape(300, size)
    chunks = [raw(rows[i : i + 7]) for i in range(0, 300, 7)]
    expected = sum(c.double().sum(0) for c in rows.split(7)) / 300
    found = torch.from_numpy(mean_row(chunks, 300, size, dtype)).view(DTYPES[dtype])
    assert torch.allclose(found.double(), expected.to(DTYPES[dtype]).double(), rtol=1e-12)
    one = tensor([[np.nan, 1.0]], "F32").raw
    assert np.array_equal(mean_row([one], 1, 2, "F32"), one)  # to the bit


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("cols", [1, 17, TILE_COLS, 2 * TILE_COLS + 5])
@pytest.mark.parametrize("rank", [1, 3, 4, 10])
def test_low_rank(rank: int, cols: int, number: type[np.floating]) -> None:
    """Every row to the bit, in the order of the rank, wherever it is cut."""
    rng = np.random.default_rng(rank * cols)
    left = rng.normal(size=(2, 7, rank)).astype(np.float32)
    right = rng.normal(size=(2, rank, cols)).astype(np.float32)
    start = rng.normal(size=(14, cols)).astype(number)
    product = np.zeros((2, 7, cols), np.float32)
    for k in range(rank):
        product += left[:, :, k : k + 1] * right[:, k : k + 1]
    expected = start + (product * np.float32(0.3)).reshape(14, cols)
    for first in range(14):
        for last in (first + 1, first + 3, first + 4, 14):
            found = start[first:last].copy()
            add_low_rank(found, left, right, 0.3, first)
            assert np.array_equal(found, expected[first:last])


@pytest.mark.parametrize(
    ("dtype", "base_dtype", "to"),
    [("BF16", "BF16", "F32"), ("F16", "BF16", "F32"), ("F32", "F16", "F32"), ("F32", "F64", "F64")],
)
def test_difference(dtype: str, base_dtype: str, to: str) -> None:
    count = 40_000  # in several pieces
    values, base = numbers(dtype, count, 0.7), numbers(base_dtype, count, 0.70001)
    expected = values.to(DTYPES[to]) - base.to(DTYPES[to])
    found = difference(raw(values), dtype, raw(base), base_dtype, to)
    assert np.array_equal(found, raw(expected))
