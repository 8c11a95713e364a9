"""Products of matrices of integers on a device, in float64 (`della_dist.ops.exact_products`).

Rows go up by the way of all chunks; what they are multiplied with, or added to, stays there. Slices
of the integers for the units that multiply int8 are left out: no figure says yet that they are
faster.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from della_dist.ops.blocks import U8Array
from della_dist.ops.gpu.staging import Event, Lane, Slot, Staging, slot_need
from della_dist.ops.grids import F64Array


class DeviceSquare:
    """A (C, C) matrix on the device, and the point of a lane at which it is complete."""

    def __init__(self, matrix_CC: torch.Tensor, complete: Event) -> None:
        self.matrix_CC = matrix_CC
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
    """

    def __init__(self, staging: Staging, device: torch.device) -> None:
        self._staging, self._device = staging, device

    def zeros(self, num_cols: int) -> DeviceSquare:
        """Return a (C, C) sum that is zero."""
        with self._staging.lane(0) as lane:
            shape = (num_cols, num_cols)
            total_CC = torch.zeros(shape, dtype=torch.float64, device=self._device)
            return DeviceSquare(total_CC, lane.compute.mark())

    def add_square(self, total: DeviceSquare, grid_rC: F64Array) -> None:
        """Add ``q' q`` to a sum of `zeros`; whatever lane has added before."""
        with self._rows(grid_rC, 1) as (lane, chunks):
            for _, _, _, there_rC in chunks:
                with total.lock:
                    lane.compute.wait(total.complete)
                    # Multiplying and adding at once rounds nothing: all is exact.
                    total.matrix_CC.addmm_(there_rC.T, there_rC)
                    total.complete = lane.compute.mark()

    def fetch(self, total: DeviceSquare) -> F64Array:
        """Return a sum; its room on the device is free then."""
        with self._staging.lane(0) as lane:
            lane.compute.wait(total.complete)
            found: F64Array = total.matrix_CC.cpu().numpy()
            total.matrix_CC = torch.empty((0, 0))
            return found

    def hold(self, matrix_CC: F64Array) -> DeviceSquare:
        """Return a matrix as a factor for `multiply`."""
        held = self.zeros(len(matrix_CC))
        with self._rows(matrix_CC, 1) as (lane, chunks):
            lane.compute.wait(held.complete)
            for start, stop, _, there_rC in chunks:
                held.matrix_CC[start:stop].copy_(there_rC)
            held.complete = lane.compute.mark()
        return held

    def multiply(self, grid_rC: F64Array, factor: DeviceSquare, out_rC: F64Array) -> None:
        """Write ``q`` times a factor of `hold`."""
        with self._rows(grid_rC, 2) as (lane, chunks):
            lane.compute.wait(factor.complete)
            for start, stop, slot, there_rC in chunks:
                product_rC = there_rC @ factor.matrix_CC
                out = out_rC[start:stop].reshape(-1).view(np.uint8)
                slot.download(product_rC.view(-1).view(torch.uint8), out, lane)

    @contextlib.contextmanager
    def _rows(
        self, rows_rC: F64Array, times: int
    ) -> Iterator[tuple[Lane, Iterator[tuple[int, int, Slot, torch.Tensor]]]]:
        """Take a lane, and send rows up in chunks.

        Parameters
        ----------
        rows_rC
            Contiguous.
        times
            How much room they take in a slot: 1, or 2 where as many come back.
        """
        num_rows, num_cols = rows_rC.shape
        row_bytes = rows_rC.itemsize * num_cols
        most = self._staging.slot_bytes // times - slot_need([1])
        step = max(1, min(num_rows, most // row_bytes))
        need = slot_need([step * row_bytes] * times)

        def parts(start: int, stop: int) -> Sequence[U8Array]:
            return [rows_rC[start:stop].reshape(-1).view(np.uint8)]

        with self._staging.lane(need, is_large=need > self._staging.slot_bytes) as lane:
            yield (
                lane,
                (
                    (start, stop, slot, there.view(torch.float64).view(-1, num_cols))
                    for start, stop, slot, (there,) in lane.chunks(parts, num_rows, step)
                ),
            )
