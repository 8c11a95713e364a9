"""The closed form of WUDI: against float64, against descent, the same bytes however it is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops import wudi
from della_dist.ops.exact_products import HostProducts
from della_dist.ops.grids import EXACT_BITS, F64Array, on_grid, sum_bits, unit_of
from della_dist.ops.wudi import DELTA_BITS, Wudi, bits_of, delta_bits, merged, solution
from della_dist.specs.balancing import Balancing
from della_dist.specs.recipe import Balance, MergeSettings

F32Array = npt.NDArray[np.float32]


def deltas(rows: int, cols: int, num_experts: int, scale: float = 1e-3) -> list[F32Array]:
    """Return deltas as training leaves them: a few directions, and noise."""
    random = np.random.default_rng([rows, cols, num_experts])
    directions = min(8, rows, cols)
    return [
        (
            random.standard_normal((rows, directions))
            @ random.standard_normal((directions, cols))
            * scale
            + random.standard_normal((rows, cols)) * scale / 4
        ).astype(np.float32)
        for _ in range(num_experts)
    ]


def solve(
    given: Sequence[F32Array],
    weights: Sequence[float],
    ridge: float = 0.05,
    step: int = 1 << 20,
    pool: ThreadPoolExecutor | None = None,
) -> F64Array | None:
    units = [unit_of(float(np.abs(one).max(initial=0.0)), DELTA_BITS) for one in given]
    rows, cols = given[0].shape
    grams = [np.zeros((cols, cols)) for _ in given]
    steps = [slice(start, start + step) for start in range(0, rows, step)]
    for rows_of in reversed(steps):  # in any order
        for m, one in enumerate(given):
            grid = on_grid(one[rows_of], units[m])
            grams[m] += grid.T @ grid
    found = solution(grams, units, weights, ridge, pool)
    if found is None:
        return None
    return np.concatenate([merged(found, [one[s] for one in given], units) for s in steps])


def plainly(given: Sequence[F32Array], weights: Sequence[float], ridge: float) -> F64Array:
    doubles = [one.astype(np.float64) for one in given]
    grams = [one.T @ one / np.sum(one * one) for one in doubles]
    total = sum(w * g for w, g in zip(weights, grams, strict=True))
    total = total + ridge * np.trace(total) / len(total) * np.eye(len(total))
    product = sum(w * d @ g for w, d, g in zip(weights, doubles, grams, strict=True))
    return np.asarray(product @ np.linalg.inv(total))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (7, 3), (64, 64), (200, 96), (40, 150)])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (0.5, 2.0, 0.0)])
def test_against_float64(rows: int, cols: int, weights: tuple[float, ...]) -> None:
    given = deltas(rows, cols, len(weights))
    for ridge in (0.02, 0.3):
        made, expected = solve(given, weights, ridge), plainly(given, weights, ridge)
        assert made is not None
        assert np.linalg.norm(made - expected) <= 1e-3 * np.linalg.norm(expected)


def test_the_same_bytes_however_it_is_cut() -> None:
    given = deltas(300, 130, 3)
    whole = solve(given, (1.0, 0.3, 1.7))
    assert whole is not None
    with ThreadPoolExecutor(2) as pool:
        for step in (1, 7, 128):
            cut = solve(given, (1.0, 0.3, 1.7), step=step, pool=pool)
            assert cut is not None
            assert cut.tobytes() == whole.tobytes()


def few_directions(rows: int, cols: int, num_experts: int) -> list[F32Array]:
    """Return deltas of one direction each that are the same everywhere: whole numbers by 2**12."""
    i, j = np.arange(rows), np.arange(cols)
    return [
        (np.outer(i * (m + 3) % 11 - 5, j * (2 * m + 5) % 13 - 6) / 2.0**12).astype(np.float32)
        for m in range(num_experts)
    ]


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_few_directions(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of models that adapters were merged into: what has no delta multiplies no rounding."""
    random = np.random.default_rng(rank)
    sides = random.standard_normal((3, rank, 2, 300))
    given = [(one[:, 0].T @ one[:, 1] * 1e-3).astype(np.float32) for one in sides]
    expected = plainly(given, (1.0, 0.3, 1.7), 0.05)
    made = solve(given, (1.0, 0.3, 1.7))
    assert made is not None
    error = np.linalg.norm(made - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    with ThreadPoolExecutor(2) as pool:
        cut = solve(given, (1.0, 0.3, 1.7), step=128, pool=pool)
    assert cut is not None
    assert cut.tobytes() == made.tobytes()
    monkeypatch.setattr(wudi, "MOST_AMPLIFIED", np.inf)
    otherwise = solve(given, (1.0, 0.3, 1.7))
    assert otherwise is not None
    assert np.linalg.norm(otherwise - expected) > 5 * error * np.linalg.norm(expected)


def test_the_minimum_that_descent_finds() -> None:
    """The published objective, by 3000 steps of gradient descent from the sum of the deltas."""
    given = [one.astype(np.float64) for one in deltas(30, 20, 3)]
    squares = [np.sum(one * one) for one in given]
    found = np.sum(given, axis=0)
    curvature = np.sum([d.T @ d / s for d, s in zip(given, squares, strict=True)], axis=0)
    rate = 1 / np.linalg.norm(curvature, 2)
    for _ in range(3000):
        slope = sum((found - d) @ (d.T @ d) / s for d, s in zip(given, squares, strict=True))
        found = found - rate * slope
    made = solve([one.astype(np.float32) for one in given], (1.0, 1.0, 1.0), ridge=1e-6)
    assert made is not None

    def objective(t: F64Array) -> float:
        return sum(
            float(np.sum(np.square((t - d) @ d.T))) / s for d, s in zip(given, squares, strict=True)
        )

    assert objective(made) <= objective(found) * (1 + 1e-3)
    assert objective(np.sum(given, axis=0) / 3) > 2 * objective(made)


def test_one_expert_is_itself_where_it_matters() -> None:
    """T D' = D D' up to the ridge: of directions that are used much, all is kept."""
    (delta,) = deltas(60, 40, 1)
    made = solve([delta], (1.0,), ridge=1e-4)
    assert made is not None
    assert np.linalg.norm(made - delta) < 0.02 * np.linalg.norm(delta)


def test_experts_that_change_nothing() -> None:
    one, other = deltas(20, 10, 2)
    zero = np.zeros_like(one)
    assert solve([zero, zero], (1.0, 1.0)) is None
    assert solve([one, other], (0.0, 0.0)) is None
    alone = solve([one], (1.0,))
    with_zero = solve([zero, one], (1.0, 1.0))
    assert alone is not None
    assert with_zero is not None
    assert np.array_equal(alone, with_zero)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_any_scale(scale: float) -> None:
    given = deltas(30, 20, 2)
    power = 2.0 ** np.round(np.log2(scale))
    made = solve(given, (1.0, 1.0))
    scaled = solve([(one * power).astype(np.float64) for one in given], (1.0, 1.0))
    assert made is not None
    assert scaled is not None
    assert np.array_equal(scaled, made * power)


@pytest.mark.parametrize("cols", [1, 2, 3, 1024, 1025, 4096, 53248])
def test_sums_are_exact(cols: int) -> None:
    bits = bits_of(cols)
    log = (cols - 1).bit_length()
    for one, other in ((DELTA_BITS, bits.gram), (bits.product, bits.inverse)):
        assert (one - 1) + (other - 1) + log == 53


@pytest.mark.parametrize("length", [1, 4096, 1 << 19, (1 << 19) + 1, 1 << 21, 1 << 25])
def test_sums_over_rows_are_exact(length: int) -> None:
    assert 2 * (delta_bits(length) - 1) + sum_bits(length) <= EXACT_BITS
    assert delta_bits(length) == DELTA_BITS or length > 1 << 19


class Watched(HostProducts):
    """Keeps what rows were added up to."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[F64Array] = []

    def fetch(self, total: F64Array) -> F64Array:
        self.sums.append(total.copy())
        return super().fetch(total)


def test_more_rows_than_sums_of_18_bits() -> None:
    """As of a large vocabulary: what is odd and beyond 2**53 is rounded, in any order otherwise."""
    rows = (1 << 19) + 33
    given = [np.full((rows, 1), value, np.float32) for value in (1 - 2.0**-17, 2.0**-10)]
    assert rows * int(on_grid(given[0][:1], -17)[0, 0]) ** 2 > 1 << 53  # of 18 bits
    how = Balancing("wudi", 1, rows, 1, False, 2, 4, num_stacked=2 * rows)
    products = Watched()
    settings = MergeSettings(weights=(1.0, 1.0), balance=Balance("wudi"), elect=False)
    rule = Wudi(settings, how, [float(one[0, 0]) for one in given], products)
    rule.look(given)
    with ThreadPoolExecutor(1) as pool:
        rule.solve(pool)
    for one, total in zip(given, products.sums, strict=True):
        grid = on_grid(one, unit_of(float(one[0, 0]), 17)).astype(np.int64)
        assert int(total[0, 0]) == int(np.sum(grid * grid)) <= 1 << 53
    made, expected = rule.merged(given), plainly(given, (1.0, 1.0), 0.05)
    assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()


#: BLAKE2b of 8 bytes of T, in float64, of `whole_numbers` of cubes: rows, columns, experts, ridge.
VECTORS = {
    (1, 1, 1, 0.05): "0c82ddeefe68f325",
    (5, 3, 2, 0.05): "8526a25a9578e5bf",
    (70, 33, 3, 0.05): "478be28a4e3ec3da",
    (20, 130, 2, 0.3): "f54a0adc4e73028a",
}


def whole_numbers(rows: int, cols: int, num_experts: int, power: int = 1) -> list[F32Array]:
    """Return deltas that are the same everywhere: i**power * 2654435761 mod 2**32, over 2**40."""
    number = np.arange(1, rows * cols * num_experts + 1, dtype=np.uint64) ** power * 2654435761
    number %= 1 << 32
    centred = (number.astype(np.float64) - 2.0**31) / 2.0**40
    return list(centred.astype(np.float32).reshape(num_experts, rows, cols))


def test_the_vector_of_few_directions() -> None:
    made = solve(few_directions(40, 130, 3), (1.0, 0.75, 0.5))
    assert made is not None
    digest = hashlib.blake2b(made.astype("<f8").tobytes(), digest_size=8)
    assert digest.hexdigest() == "28b1c6579e2e6e44"


@pytest.mark.parametrize("case", VECTORS)
def test_vectors(case: tuple[int, int, int, float]) -> None:
    """What any other implementation of the definition must come to."""
    rows, cols, num_experts, ridge = case
    weights = tuple(1 - 0.25 * m for m in range(num_experts))
    made = solve(whole_numbers(rows, cols, num_experts, 3), weights, ridge)
    assert made is not None
    digest = hashlib.blake2b(made.astype("<f8").tobytes(), digest_size=8)
    assert digest.hexdigest() == VECTORS[case]
