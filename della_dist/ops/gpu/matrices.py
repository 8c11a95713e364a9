"""Products of matrices of integers on a device, in float64 (`della_dist.ops.exact_products`).

Rows go up by the way of all chunks; what they are multiplied with, or added to, stays there. Slices
of the integers for the units that multiply int8 are left out: no figure says yet that they are
faster.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import torch

from della_dist.ops.gpu.staging import ALIGNMENT, Event, Lane, Slot, Staging, memory_of, slot_need
from della_dist.ops.grids import F64Array


class DeviceMatrix:
    """A matrix on the device, and the point of a lane at which it is complete."""

    def __init__(self, matrix_KC: torch.Tensor, complete: Event) -> None:
        self.matrix_KC = matrix_KC
        self.complete = complete
        self.lock = threading.Lock()


class DeviceProducts:
    """On a torch device.

    Parameters
    ----------
    staging
        The lanes of the device.
    device
        Which.
    name
        Of the tensor, for errors.
    """

    def __init__(self, staging: Staging, device: torch.device, name: str) -> None:
        self._staging, self._device, self._name = staging, device, name

    def zeros(self, num_cols: int) -> DeviceMatrix:
        """Return a (C, C) sum that is zero."""
        with memory_of(self._name), self._staging.lane(0) as lane:
            shape = (num_cols, num_cols)
            total_CC = torch.zeros(shape, dtype=torch.float64, device=self._device)
            return DeviceMatrix(total_CC, lane.compute.mark())

    def add_square(self, total: DeviceMatrix, grid_rC: F64Array) -> None:
        """Add ``q' q`` to a sum of `zeros`; whatever lane has added before."""
        with self._rows(grid_rC) as (lane, chunks):
            for _, _, _, there_rC in chunks:
                with total.lock:
                    lane.compute.wait(total.complete)
                    # Multiplying and adding at once rounds nothing: all is exact.
                    total.matrix_KC.addmm_(there_rC.T, there_rC)
                    total.complete = lane.compute.mark()

    def fetch(self, total: DeviceMatrix) -> F64Array:
        """Return a sum; its room on the device is free then."""
        with self._staging.lane(0) as lane:
            lane.compute.wait(total.complete)
            found: F64Array = total.matrix_KC.cpu().numpy()
            total.matrix_KC = torch.empty((0, 0))
            return found

    def gram(self, rows_NC: F64Array, pool: Executor) -> F64Array:
        """Return the products of all rows with one another: columns go up, a slot at a time."""
        total = self.zeros(len(rows_NC))
        step = self._rows_of_a_slot(8 * len(rows_NC))

        def add(start: int) -> None:
            self.add_square(total, rows_NC[:, start : start + step].T)

        list(pool.map(add, range(0, rows_NC.shape[1], step)))
        return self.fetch(total)

    def hold(self, matrix_KC: F64Array) -> DeviceMatrix:
        """Return a matrix as a factor for `multiply`."""
        with self._rows(matrix_KC) as (lane, chunks):
            there_KC = torch.empty(matrix_KC.shape, dtype=torch.float64, device=self._device)
            for start, stop, _, there_rC in chunks:
                there_KC[start:stop].copy_(there_rC)
            return DeviceMatrix(there_KC, lane.compute.mark())

    def multiply(self, grid_rK: F64Array, factor: DeviceMatrix, out_rC: F64Array) -> None:
        """Write ``q`` times a factor of `hold`, to what is contiguous; no zero is negative."""
        with self._rows(grid_rK, out_rC.shape[1]) as (lane, chunks):
            lane.compute.wait(factor.complete)
            for start, stop, slot, there_rK in chunks:
                product_rC = (there_rK @ factor.matrix_KC).add_(0.0)
                out = out_rC[start:stop].reshape(-1).view(np.uint8)
                slot.download(product_rC.view(-1).view(torch.uint8), out, lane)

    @contextlib.contextmanager
    def _rows(
        self, rows_rK: F64Array, out_cols: int = 0
    ) -> Iterator[tuple[Lane, Iterator[tuple[int, int, Slot, torch.Tensor]]]]:
        """Take a lane, and send rows up in chunks.

        Parameters
        ----------
        rows_rK
            In any order in memory.
        out_cols
            Columns of what comes back of each row, by the same slot.
        """
        num_rows, num_cols = rows_rK.shape
        step = min(num_rows, self._rows_of_a_slot(8 * (num_cols + out_cols)))
        need = slot_need([8 * step * num_cols, 8 * step * out_cols])

        def parts(start: int, stop: int) -> Sequence[F64Array]:
            return [rows_rK[start:stop]]

        is_large = need > self._staging.slot_bytes
        with memory_of(self._name), self._staging.lane(need, is_large=is_large) as lane:
            yield (
                lane,
                (
                    (start, stop, slot, there.view(torch.float64).view(-1, num_cols))
                    for start, stop, slot, (there,) in lane.chunks(parts, num_rows, step)
                ),
            )

    def _rows_of_a_slot(self, row_bytes: int) -> int:
        """Return how many rows a slot holds, with what comes back of them; one at least."""
        return max(1, (self._staging.slot_bytes - 2 * ALIGNMENT) // row_bytes)
