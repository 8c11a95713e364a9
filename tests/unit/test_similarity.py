"""The sums of the check, against plain loops over numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from della_dist.ops.similarity import Sums, block_sums, total
from tests.tensors import from_raw, to_raw

DTYPES = ("BF16", "F32", "F16", "F64")


def family(seed: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return raw bytes and numbers of a reference and three models: one is given as its delta."""
    rng = np.random.default_rng(seed)
    start = from_raw(to_raw(rng.normal(size=count), DTYPES[0]), DTYPES[0])
    raws = [to_raw(start, DTYPES[0])]
    for m, dtype in enumerate(DTYPES[1:]):
        delta = rng.normal(0, 0.01, count) * (rng.random(count) < 0.7)
        values = delta if m == 0 else start + delta
        if seed % 2:
            values[rng.integers(count, size=3)] = [np.nan, np.inf, -np.inf]
        raws.append(to_raw(values, dtype))
    if seed == 3:
        start[5] = np.nan
        raws[0] = to_raw(start, DTYPES[0])
    numbers = [from_raw(raw, dtype) for raw, dtype in zip(raws, DTYPES, strict=True)]
    numbers[1] = numbers[0] + numbers[1]
    return raws, numbers


def sums_of(raws: list[np.ndarray], start: int, stop: int) -> Sums:
    sizes = (2, 4, 2, 8)
    reference, *models = (
        raw[start * size : stop * size] for raw, size in zip(raws, sizes, strict=True)
    )
    return block_sums(reference, DTYPES[0], models, DTYPES[1:], (True, False, False))


@pytest.mark.parametrize("seed", range(4))
def test_as_loops_do(seed: int) -> None:
    raws, (reference, *models) = family(seed, 400)
    found = total([sums_of(raws, 0, 100), sums_of(raws, 100, 101), sums_of(raws, 101, 400)])
    assert found.num_elements == 400
    assert found.reference_nonfinite == (seed == 3)
    healthy = [
        [i for i in range(400) if math.isfinite(x[i]) and math.isfinite(reference[i])]
        for x in models
    ]
    for m, (x, places) in enumerate(zip(models, healthy, strict=True)):
        assert found.nonfinite[m] == sum(not math.isfinite(v) for v in x)
        delta = {i: x[i] - reference[i] for i in places}
        assert found.untouched[m] == sum(d == 0 for d in delta.values())
        for sums, expected in (
            (found.reference_squares, math.fsum(reference[i] ** 2 for i in places)),
            (found.squares, math.fsum(x[i] ** 2 for i in places)),
            (found.dots, math.fsum(x[i] * reference[i] for i in places)),
        ):
            assert sums[m] == pytest.approx(expected, rel=1e-12)
        for n, (y, others) in enumerate(zip(models, healthy, strict=True)):
            both = {i: (delta[i], y[i] - reference[i]) for i in set(places) & set(others)}
            expected = math.fsum(d * e for d, e in both.values())
            assert found.delta_dots[m, n] == pytest.approx(expected, rel=1e-9, abs=1e-15)
            assert found.changed[m, n] == sum(d != 0 and e != 0 for d, e in both.values())
            assert found.agreed[m, n] == sum(d * e > 0 for d, e in both.values())


def test_numbers_too_large_to_square() -> None:
    huge = to_raw([1e200, 1.0], "F64")
    found = block_sums(huge, "F64", [huge], ["F64"], [False])
    assert (found.nonfinite[0], found.untouched[0]) == (0, 2)
    assert math.isinf(found.squares[0])
