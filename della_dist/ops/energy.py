"""Weights by energy, the sum of squares of what is kept of an expert (SCE, arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Sequence


def weights_by_energy(energies: Sequence[float]) -> tuple[float, ...]:
    """Return every expert's part of all squares; equal parts where there are none.

    Parameters
    ----------
    energies
        (M,) from 0 on; infinite where a float64 does not hold one.

    Returns
    -------
    tuple
        (M,) that add up to 1; NaN where an energy is infinite.
    """
    total = 0.0
    for energy in energies:  # not sum(): from Python 3.12 on it compensates
        total += energy
    if total == 0:
        return (1.0 / len(energies),) * len(energies)
    return tuple(energy / total if total < float("inf") else float("nan") for energy in energies)
