"""Sine, cosine and arc cosine beside those of mpmath, which have as many digits as one likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.trigonometry import arc_cosine, cosine, sine

RNG = np.random.default_rng(0)
ANGLES = np.concatenate(
    [
        RNG.uniform(-4, 4, 2000),
        RNG.uniform(-(2**20), 2**20, 2000),
        2.0 ** RNG.uniform(-60, 3, 1000),
        np.arange(-1000, 1000) * np.pi / 4,  # where one of both is hardly above zero
        np.array([0.0, np.pi, np.pi / 2, 1e-300, 5e-324, 2.0**20]),
    ]
)
COSINES = np.concatenate(
    [
        RNG.uniform(-1, 1, 3000),
        1 - 2.0 ** RNG.uniform(-53, 0, 1000),
        2.0 ** RNG.uniform(-53, 0, 1000) - 1,
        2.0 ** RNG.uniform(-60, 0, 500),
        np.array([1.0, -1.0, 0.0, 0.5, -0.5, 0.9995]),
    ]
)


@pytest.mark.parametrize(
    ("function", "oracle", "places"),
    [
        (sine, mpmath.sin, ANGLES),
        (cosine, mpmath.cos, ANGLES),
        (arc_cosine, mpmath.acos, COSINES),
    ],
)
def test_within_two_units_of_the_last_place(
    function: Callable[..., Any], oracle: Callable[..., Any], places: npt.NDArray[np.float64]
) -> None:
    with mpmath.workprec(300):
        for place, value in zip(places.tolist(), function(places).tolist(), strict=True):
            exact = oracle(mpmath.mpf(place))
            error = abs(mpmath.mpf(value) - exact)
            assert error <= 1.5 * np.spacing(abs(float(exact))), place


def test_ends() -> None:
    assert arc_cosine([1.0, -1.0, 0.0]).tolist() == [0, np.pi, np.pi / 2]
    assert sine(0.0) == 0
    assert cosine(0.0) == 1
    assert arc_cosine(COSINES).tolist() == [float(arc_cosine(c)) for c in COSINES]
