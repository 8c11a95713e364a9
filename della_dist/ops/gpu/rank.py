"""Ranking of magnitudes and MagPrune's keep probabilities in torch, on any device."""

from __future__ import annotations

import torch


def twice_mean_ranks(key_RC: torch.Tensor) -> torch.Tensor:
    """Return twice the mean rank of every key within its row.

    Equal keys share the mean of their ranks, which does not depend on the order of the elements.
    Twice the mean is an integer: ``first + last`` of the ranks that the equal keys occupy.

    Parameters
    ----------
    key_RC
        (R, C): magnitude bits as integers.

    Returns
    -------
    torch.Tensor
        (R, C) int64.
    """
    ordered_RC, indices_RC = torch.sort(key_RC, dim=1)
    del indices_RC
    first_RC = torch.searchsorted(ordered_RC, key_RC, right=False)
    return first_RC.add_(torch.searchsorted(ordered_RC, key_RC, right=True)).sub_(1)


def keep_probabilities(key_RC: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Return MagPrune's keep probability of every element (DELLA paper, section 3.1).

    The arithmetic is float64, one operation at a time, rounded once to float32.

    Parameters
    ----------
    key_RC
        (R, C): magnitude bits as integers; C > 1.
    density, epsilon
        Mean keep probability, and half the width of the window around it.

    Returns
    -------
    torch.Tensor
        (R, C) float32.
    """
    # A divisor must live on the device: torch multiplies by the reciprocal of a Python number on
    # CUDA, which rounds differently.
    span = torch.full((1,), key_RC.shape[1] - 1, dtype=torch.float64, device=key_RC.device)
    position_RC = twice_mean_ranks(key_RC).to(torch.float64) * 0.5
    position_RC = position_RC / span
    position_RC = position_RC * (2.0 * epsilon)
    return (position_RC + (density - epsilon)).to(torch.float32)
