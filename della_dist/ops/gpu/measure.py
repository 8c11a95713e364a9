"""What `prepare` asks to be measured, added up as integers on the device. M experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from della_dist.ops.gpu.stats import chunk_sums, in_chunks, unit_sums
from della_dist.ops.measurements import Selected, Summed
from della_dist.ops.prepare import Selecting, Summing
from della_dist.specs.passes import SELECT_BUCKETS, num_products

#: Larger than the bits of any magnitude, also of float64.
_ABOVE_ALL = 0x7FFF_FFFF_FFFF_FFFF


class SelectCounts:
    """Histograms of 16 magnitude bits below prefixes, with the range of each bucket."""

    def __init__(self, prepared: Selecting, num_experts: int, device: torch.device) -> None:
        self._prepared = prepared
        self._num_experts = num_experts
        self._counted = prepared.counted
        # The last bucket collects what is not below the prefix, or does not count.
        shape = (len(prepared.prefix), SELECT_BUCKETS + 1)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._min = torch.full(shape, _ABOVE_ALL, dtype=torch.int64, device=device)
        self._max = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, m: int, key: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Add the magnitude bits `key`, (n,) int32 or int64, of expert `m`.

        `keep`, (n,) bool, tells which of them count; None: all.
        """
        prepared = self._prepared
        key = key.to(torch.int64)
        for s in range(m, len(self._counted), self._num_experts):
            if not self._counted[s]:
                continue
            bucket = (key >> prepared.shift) & ((1 << prepared.bits) - 1)
            below = (key >> (prepared.shift + prepared.bits)) == prepared.prefix[s]
            if keep is not None:
                below = below & keep
            bucket = torch.where(below, bucket, SELECT_BUCKETS)
            self._counts[s].scatter_add_(0, bucket, torch.ones_like(bucket))
            self._min[s].scatter_reduce_(0, bucket, key, "amin")
            self._max[s].scatter_reduce_(0, bucket, key, "amax")

    def measurement(self, num_nonfinite: npt.NDArray[np.int64]) -> Selected:
        """Return what was counted, on the host."""
        counts, key_min, key_max = (
            np.ascontiguousarray(table[:, :SELECT_BUCKETS].cpu().numpy())
            for table in (self._counts, self._min, self._max)
        )
        key_min = key_min.view(np.uint64)
        key_min[counts == 0] = np.iinfo(np.uint64).max
        return Selected(num_nonfinite, counts, key_min, key_max.view(np.uint64))


class ProductSums:
    """Sums of the products of all pairs of deltas, a unit at a time."""

    def __init__(self, num_experts: int, unit: int, *, squares: bool = False) -> None:
        self._unit = unit
        self._num_sums = num_experts if squares else num_products(num_experts)
        self._squares = squares  # of every expert with itself alone
        self._parts: list[torch.Tensor] = []

    def add(self, deltas: Sequence[torch.Tensor]) -> None:
        """Multiply the deltas of a chunk: (M, n), whole units."""
        groups = in_chunks(deltas, self._unit)
        if self._squares:
            sums = chunk_sums(groups.square_())
        else:  # in the order of the pairs: the first with all, the second with all after it
            sums = torch.cat([chunk_sums(groups[m:] * groups[m]) for m in range(len(deltas))])
        self._parts.append(sums)

    def sums(self) -> npt.NDArray[np.float64]:
        """Return the sums (P, U) on the host."""
        return unit_sums(self._parts) if self._parts else np.zeros((self._num_sums, 0))


class L1Sums:
    """Sums of significands for every exponent, before and after the drop."""

    def __init__(self, prepared: Summing, num_experts: int, device: torch.device) -> None:
        self._mantissa_bits = 52 if prepared.wide else 23
        shape = (num_experts, 2, 2, 2048 if prepared.wide else 256)
        self._sums = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, m: int, key: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Add the magnitude bits `key`, (n,), of expert `m`; `keep` (n,) bool, None for all."""
        key = key.to(torch.int64)
        exponent = key >> self._mantissa_bits
        implicit = (exponent != 0).to(torch.int64) << self._mantissa_bits
        significand = (key & ((1 << self._mantissa_bits) - 1)) | implicit
        exponent.clamp_(min=1)
        for stage in range(2):
            if stage == 1 and keep is not None:
                significand = significand * keep
            self._sums[m, stage, 0].scatter_add_(0, exponent, significand & ((1 << 26) - 1))
            self._sums[m, stage, 1].scatter_add_(0, exponent, significand >> 26)

    def measurement(self, num_nonfinite: npt.NDArray[np.int64]) -> Summed:
        """Return the sums, on the host."""
        return Summed(num_nonfinite, self._sums.cpu().numpy())
