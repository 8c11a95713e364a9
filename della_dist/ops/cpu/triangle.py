"""The triangle of a QR decomposition in Numba: the same bits on every machine.

By modified Gram-Schmidt, whose triangle is as good as Householder's: that of a matrix which differs
in the last bits of its columns (Higham: Accuracy and Stability of Numerical Algorithms, theorem
19.13). Sums go along the rows, in their order. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.cpu.intrinsics import wide_vectors
from della_dist.ops.cpu.support import Array, Number, entry, inner, source_digest

F64Array = npt.NDArray[np.float64]


def triangle(matrix: F64Array) -> F64Array:
    """Return the upper triangle U with ``U' U = matrix' matrix``.

    Parameters
    ----------
    matrix
        (R, K) float64, contiguous. Overwritten. Columns may be zero, or hang on others.

    Returns
    -------
    array
        (K, K).
    """
    factor_KK = np.zeros((matrix.shape[1], matrix.shape[1]))
    _kernel()(matrix, factor_KK)
    return factor_KK


@cache
def _kernel() -> Callable[..., Any]:
    digest = source_digest()

    @entry
    def orthogonalise(matrix: Array, factor: Array) -> None:
        """Write the triangle to `factor`, (K, K) of zeros; what is left of `matrix` is of no use.

        One column after another is taken out of those that follow.
        """
        _ = digest
        num_rows, num_cols = matrix.shape
        for j in range(num_cols):
            squares = 0.0
            for i in range(num_rows):
                squares += matrix[i, j] * matrix[i, j]
            length = np.sqrt(squares)
            if length == 0.0:
                continue
            row = factor[j]
            row[j] = length
            for i in range(num_rows):
                matrix[i, j] /= length
                _add_scaled(matrix[i, j + 1 :], matrix[i, j], row[j + 1 :])
            for i in range(num_rows):
                _add_scaled(row[j + 1 :], -matrix[i, j], matrix[i, j + 1 :])

    return orthogonalise


@inner
def _add_scaled(row: Array, factor: Number, out: Array) -> None:
    wide_vectors()
    for j in range(out.size):
        out[j] += row[j] * factor
