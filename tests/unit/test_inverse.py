"""The inverse that no library computes: right, and the same bits however it is cut."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from della_dist.ops.cpu import inverse as module
from della_dist.ops.cpu import products
from della_dist.ops.cpu.inverse import inverse
from della_dist.ops.cpu.products import F64Array, product


def positive(n: int, condition: float = 300.0) -> F64Array:
    """Return a matrix of integers over a power of two, the same on every machine."""
    numbers = np.random.Generator(np.random.Philox(n)).integers(-100, 101, (2 * n + 1, n))
    gram: F64Array = (numbers.T @ numbers).astype(np.float64) / 2**20
    gram[np.diag_indices(n)] += gram.trace() / n / condition
    return gram


@pytest.mark.parametrize("n", [1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 300])
def test_inverse(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = positive(n)
    made = inverse(matrix.copy())
    assert np.array_equal(made, made.T)
    expected = np.linalg.inv(matrix)
    assert np.abs(made - expected).max() <= 1e-12 * np.abs(expected).max()
    with ThreadPoolExecutor(3) as pool:
        assert np.array_equal(inverse(matrix.copy(), pool), made)
    for rows, strip in ((16, 24), (200, 40)):
        monkeypatch.setattr(module, "PANEL_ROWS", rows)
        monkeypatch.setattr(products, "STRIP", strip)
        assert np.array_equal(inverse(matrix.copy()), made)
    lower = np.tril(np.full((n, n), np.nan), -1)
    assert np.array_equal(inverse(np.triu(matrix) + lower), made)  # which is not read


@pytest.mark.parametrize(
    ("length", "rows", "cols"), [(1, 1, 1), (7, 5, 130), (300, 129, 40), (0, 3, 4)]
)
def test_product(length: int, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.Generator(np.random.Philox(rows))
    left, right = numbers.standard_normal((length, rows)), numbers.standard_normal((length, cols))
    made = product(left, right)
    in_order = np.zeros((rows, cols))
    for one, other in zip(left, right, strict=True):
        in_order += np.multiply.outer(one, other)
    assert np.array_equal(made, in_order)
    with ThreadPoolExecutor(3) as pool:
        for strip, wide in ((16, 24), (128, 1)):
            monkeypatch.setattr(products, "STRIP", strip)
            monkeypatch.setattr(products, "WIDE_STRIP", wide)
            assert np.array_equal(product(left, right, pool), made)


def test_it_is_the_one_of_every_machine() -> None:
    digest = hashlib.blake2b(inverse(positive(150)).astype("<f8").tobytes(), digest_size=8)
    assert digest.hexdigest() == "f2d568fc38fc67bb"


@pytest.mark.parametrize("n", [1, 3, 100])
def test_what_has_none(n: int) -> None:
    for matrix in (np.zeros((n, n)), -np.eye(n), np.full((n, n), np.nan)):
        with pytest.raises(ValueError, match="not positive definite"):
            inverse(matrix)
    singular = np.ones((100, 100))
    with pytest.raises(ValueError, match="not positive definite"):
        inverse(singular)
