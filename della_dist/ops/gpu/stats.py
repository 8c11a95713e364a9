"""Counting on the device, in an order that no block or chunk size changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from della_dist.ops.blocks import SQUARES_CHUNK, SQUARES_SUMS, BlockStats


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """Return the bits of ``|delta|`` as integers, which are ordered like the magnitudes.

    Returns
    -------
    torch.Tensor
        int32 for float32 (31 bits), int64 for float64 (63 bits); the shape of `delta`.
    """
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return delta.view(torch.int32) & 0x7FFF_FFFF


def in_chunks(deltas: Sequence[torch.Tensor], unit: int) -> torch.Tensor:
    """Return deltas as the groups of the chunks of their units (`della_dist.ops.blocks`).

    Parameters
    ----------
    deltas
        (M, n): whole units, the last one may be shorter.
    unit
        Elements of a unit.

    Returns
    -------
    torch.Tensor
        (M, U, K, G, 16) float64, for K chunks a unit of G groups. What is not there counts as zero.
    """
    size, count = deltas[0].numel(), len(deltas)
    unit = min(unit, size)
    chunk = min(SQUARES_CHUNK, -(-unit // SQUARES_SUMS) * SQUARES_SUMS)
    num_units, num_chunks = -(-size // unit), -(-unit // chunk)
    shape = (count, num_units, num_chunks * chunk)
    values_MUN = torch.zeros(shape, dtype=torch.float64, device=deltas[0].device)
    whole = size // unit
    for values_UN, delta in zip(values_MUN, deltas, strict=True):
        values_UN[:whole, :unit] = delta[: whole * unit].view(whole, unit)
        if whole < num_units:
            values_UN[whole, : size - whole * unit] = delta[whole * unit :]
    return values_MUN.view(count, num_units, num_chunks, -1, SQUARES_SUMS)


def chunk_sums(groups: torch.Tensor) -> torch.Tensor:
    """Return the sums of all chunks: (..., K) of (..., K, G, 16), float64."""
    # Adding zero makes +0.0 of -0.0, with which the other backend cannot begin.
    sums = groups[..., 0, :] + 0.0
    for i in range(1, groups.shape[-2]):
        sums += groups[..., i, :]
    half = SQUARES_SUMS
    while half > 1:
        half //= 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def unit_sums(parts: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    """Return the sums of units, chunk after chunk, on the host: (P, U), of several (P, U, K)."""
    flat = torch.cat([part.reshape(-1) for part in parts]).cpu().numpy()
    found, start = [], 0
    for part in parts:
        sums = flat[start : start + part.numel()].reshape(part.shape)
        # `accumulate` adds in order.
        found.append(np.add.accumulate(sums, axis=-1)[..., -1])
        start += part.numel()
    return np.concatenate(found, axis=-1)


class Tally:
    """Adds up the statistics of one block on the device, where they stay until its end."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._experts = torch.zeros((5, num_experts), dtype=torch.int64, device=device)
        self._nonfinite, self._nonzero, self._kept, self._elected, self._max_bits = self._experts
        self._totals = torch.zeros(3, dtype=torch.int64, device=device)
        self._sums: list[torch.Tensor] = []
        self._wide = False

    def add_delta(
        self,
        m: int,
        delta: torch.Tensor,
        finite: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> None:
        """Count expert `m`'s deltas: float (n,), bool (n,), bool (n,) or None where all stay."""
        nonzero = delta != 0
        self._nonfinite[m] += finite.logical_not().sum()
        self._nonzero[m] += nonzero.sum()
        self._kept[m] += nonzero.sum() if keep is None else nonzero.logical_and_(keep).sum()
        self._max_bits[m] = torch.maximum(self._max_bits[m], magnitude_bits(delta).max())
        self._wide = delta.dtype == torch.float64

    def add_merged(self, deltas: Sequence[torch.Tensor], merged: torch.Tensor, unit: int) -> None:
        """Measure the merged delta of a chunk, and multiply it by those of the experts.

        Parameters
        ----------
        deltas, merged
            (M, n) and (n,): whole units. Squares of all, and products of each with the merged one,
            are added up a unit at a time.
        unit
            Elements of a unit.
        """
        count = len(deltas)
        factors = in_chunks([*deltas, merged, *deltas], unit)
        factors[count + 1 :].mul_(factors[count])
        factors[: count + 1].square_()
        self._sums.append(chunk_sums(factors))
        self._totals[2] = torch.maximum(self._totals[2], magnitude_bits(merged).max())

    def add_elected(self, m: int, elected: torch.Tensor) -> None:
        """Count the contributions of expert `m` that entered the sum: bool (n,)."""
        self._elected[m] += elected.sum()

    def add_conflicts(self, conflicts: torch.Tensor) -> None:
        """Count the elements at which the contributions have both signs: bool (n,)."""
        self._totals[0] += conflicts.sum()

    def add_overflow(self, num_overflow: torch.Tensor) -> None:
        """Add a number of overflows: int64 ()."""
        self._totals[1] += num_overflow

    def block_stats(self, *, elect: bool) -> BlockStats:
        """Return what was counted; `elect` False: every kept contribution entered the sum."""
        found = torch.cat((self._experts.reshape(-1), self._totals)).cpu().numpy()
        conflicts, overflow, _ = found[-3:].tolist()
        nonfinite, nonzero, kept, elected, max_bits = found[:-3].reshape(self._experts.shape)
        count = len(nonfinite)
        sums = unit_sums(self._sums) if self._sums else np.zeros((2 * count + 1, 0))
        max_bits = np.append(max_bits, found[-1])
        max_abs = (
            max_bits.view(np.float64)
            if self._wide
            else max_bits.astype(np.uint32).view(np.float32).astype(np.float64)
        )
        return BlockStats(
            num_nonfinite=nonfinite,
            num_nonzero=nonzero,
            num_kept=kept,
            num_elected=elected if elect else kept.copy(),
            max_abs=max_abs[:-1],
            sum_sq=np.ascontiguousarray(sums[:count].T),
            merged_sq=sums[count],
            dots=np.ascontiguousarray(sums[count + 1 :].T),
            merged_max_abs=float(max_abs[-1]),
            num_conflicts=conflicts,
            num_overflow=overflow,
        )
