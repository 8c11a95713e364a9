"""What of all experts together decides which elements are kept, in torch. n elements of a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from della_dist.ops.divergence import (
    EPS,
    EXPONENTIAL,
    LEAST_EXPONENT,
    LOG2_E,
    LOG_2,
    LOGARITHM,
    MOST,
    ONE_BITS,
    ROOT_BITS,
    TO_WHOLE,
)
from della_dist.ops.gpu.stats import chunk_sums, in_chunks


def importances(base: torch.Tensor, delta: torch.Tensor, cols: int) -> torch.Tensor:
    """Return the magnitudes of an expert's deltas, times the divergences of their rows.

    Parameters
    ----------
    base, delta
        (n,) float32 or float64: whole rows of the base, and the finite deltas.
    cols
        Elements of a row.

    Returns
    -------
    torch.Tensor
        (n,) of the same dtype.
    """
    divergence = divergences(base, delta, cols).to(delta.dtype)
    return delta.abs() * divergence.repeat_interleave(cols)


def variances(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the variances of what experts have at each element, computed in float64.

    Parameters
    ----------
    deltas
        (M, n) float32 or float64: the finite deltas.

    Returns
    -------
    torch.Tensor
        (n,) of the same dtype.
    """
    count = torch.full((1,), len(deltas), dtype=torch.float64, device=deltas[0].device)
    mean = torch.zeros_like(deltas[0], dtype=torch.float64)
    total = torch.zeros_like(mean)
    for delta in deltas:
        mean = mean + delta.to(torch.float64)
    mean = mean / count
    for delta in deltas:
        away = delta.to(torch.float64) - mean
        total = total + away * away
    return (total / count).to(deltas[0].dtype)


def divergences(base: torch.Tensor, delta: torch.Tensor, cols: int) -> torch.Tensor:
    """Return the divergences of an expert's rows from the base's (`della_dist.ops.divergence`).

    Returns
    -------
    torch.Tensor
        (R,) float64.
    """
    q = torch.where(torch.isfinite(base), base.to(torch.float64), -torch.inf)
    p = (q + delta.to(torch.float64)).clamp(max=MOST)
    probabilities = []
    for row in (p, q):
        row_RC = row.view(-1, cols)
        top_R = row_RC.max(dim=1).values
        top_R = torch.where(torch.isinf(top_R), 0.0, top_R)
        e_RC = _exponential(row_RC - top_R[:, None])
        total_R = _row_sums(e_RC)
        total_R = torch.where(total_R == 0, 1.0, total_R)
        probabilities.append(e_RC / total_R[:, None] + EPS)
    p_RC, q_RC = probabilities
    return _row_sums(p_RC * _logarithm(p_RC / q_RC)).clamp(min=0.0)


def _row_sums(values_RC: torch.Tensor) -> torch.Tensor:
    (sums_RK,) = chunk_sums(in_chunks([values_RC.reshape(-1)], values_RC.shape[1]))
    total_R = sums_RK[:, 0]
    for k in range(1, sums_RK.shape[1]):  # in order, on the device
        total_R = total_R + sums_RK[:, k]
    return total_R


def _exponential(x: torch.Tensor) -> torch.Tensor:
    y = x.clamp(min=LEAST_EXPONENT)
    shifted = y * LOG2_E + TO_WHOLE
    number = shifted - TO_WHOLE
    r = (y - number * LOG_2[0]) - number * LOG_2[1]
    total = torch.full_like(r, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        total = total * r + coefficient
    power = ((shifted.view(torch.int64) << 52) + ONE_BITS).view(torch.float64)
    return torch.where(x < LEAST_EXPONENT, 0.0, (1.0 + (r + r * (r * total))) * power)


def _logarithm(x: torch.Tensor) -> torch.Tensor:
    bits = x.view(torch.int64)
    number = (bits - ROOT_BITS) >> 52
    m = (bits - (number << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    total = torch.full_like(s, LOGARITHM[0])
    for coefficient in LOGARITHM[1:]:
        total = total * square + coefficient
    whole = number.to(torch.float64) * (LOG_2[0] + LOG_2[1])
    return whole + 2.0 * (s + s * (square * total))
