"""The pipeline in torch: written for CUDA, runs on any device that has float64.

Every operation on floating-point numbers that can reach the output is elementwise and a kernel of
its own, so that nothing is reordered and no multiplication and addition are contracted:

* no ``alpha=``, ``addcmul``, ``cumsum``; reductions are over integers only, and products of
  matrices over integers in float64 (`della_dist.ops.gpu.matrices`);
* a divisor is a tensor on the device, never a Python number: CUDA would multiply by its
  reciprocal;
* Python numbers that take part are already rounded to the compute dtype.

Blocks are worked through in chunks of whole units (`della_dist.ops.gpu.sizes`), which bounds the
device memory, by way of buffers that stay (`della_dist.ops.gpu.staging`). Within a block nothing
waits for the device but for a slot; what is counted is fetched once at its end. A chunk is some
hundreds of kernels, whatever its size, and Python launches them one at a time: large blocks, which
a larger ``--memory`` allows, are what keeps a GPU busy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
import torch

from della_dist.ops.blocks import Block, BlockStats, U8Array
from della_dist.ops.gpu.chunk import Chunk, base_of, delta_of, deltas_of, merge_chunk, scores_of
from della_dist.ops.gpu.matrices import DeviceProducts
from della_dist.ops.gpu.measure import L1Sums, ProductSums, SelectCounts
from della_dist.ops.gpu.sizes import (
    NUM_LANES,
    chunk_size,
    device_bytes,
    is_large,
    large_slots,
    shares,
    tables_bytes,
)
from della_dist.ops.gpu.staging import NUM_SLOTS, Lane, Staging, memory_of
from della_dist.ops.gpu.stats import Tally, magnitude_bits
from della_dist.ops.gpu.steps import drop
from della_dist.ops.measurements import Counted, Measurement, Multiplied, multiplied
from della_dist.ops.prepare import Counting, Multiplying, Pending, Ready, Selecting, Squaring
from della_dist.specs.dtypes import itemsize
from della_dist.specs.passes import is_scored
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import row_view

#: Elements of a block beyond which nothing is gained: launching kernels costs little by then, and
#: a matrix of a large model is still several blocks, which lanes work on together.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}

#: Of the device memory that is free, what is used unless it is said: the context of CUDA and the
#: pieces of its allocator take some beside.
FREE_SHARE = 0.8
#: Of the CPU device, which is there to be compared with.
HOST_DEVICE_MEMORY = 512 << 20
#: Host memory for slots, where nobody says.
HOST_MEMORY = 16 << 20


class TorchBackend:
    """Merges blocks on a torch device; equal to the byte to every other backend.

    Any number of threads may call it at once; `NUM_LANES` of them are served together.

    Parameters
    ----------
    device
        As torch calls it.
    gpu_memory
        Bytes that it may use on the device; None: `FREE_SHARE` of what is free there now.
    host_memory
        Bytes that it may hold on the host, for copies to and from the device.
    """

    name = "torch"

    def __init__(
        self, device: str = "cpu", *, gpu_memory: int | None = None, host_memory: int = HOST_MEMORY
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            gpu_memory = _allow(self.device, gpu_memory)
        self._is_host: bool = self.device.type == "cpu"
        self._has = shares(gpu_memory or HOST_DEVICE_MEMORY, host_memory)
        self.block_elements = BLOCK_ELEMENTS["cpu" if self._is_host else "cuda"]
        self.device_memory = self._has.device_memory
        slots = NUM_LANES * NUM_SLOTS * self._has.slot_bytes
        self.staging_bytes = slots * 2 if self._is_host else slots
        self._staging = Staging(self.device, NUM_LANES, self._has.slot_bytes)

    def products(self, name: str) -> DeviceProducts:
        """Return where integers of a tensor's matrices are multiplied."""
        return DeviceProducts(self._staging, self.device, name)

    def device_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes that all calls together take on the device, for one such tensor."""
        return device_bytes(recipe, block_elements, self._has)

    def scratch_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes of host memory that one call needs beside the block and its output.

        Without what is held all the time (`staging_bytes`); on the CPU device with what another
        has on its own memory.
        """
        size = chunk_size(recipe, block_elements, self._has)
        slots = large_slots(size, self._has)
        tables = tables_bytes(recipe, block_elements)
        return tables + slots + (slots + size.computing) * self._is_host

    def measure(self, recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        num_experts = len(block.experts)
        with self._lane(recipe, block) as lane:
            num_nonfinite = torch.zeros(num_experts, dtype=torch.int64, device=self.device)
            if isinstance(prepared, (Multiplying, Squaring, Counting)):
                return self._measure_together(recipe, prepared, block, lane)
            sums: SelectCounts | L1Sums
            if isinstance(prepared, Selecting):
                sums = SelectCounts(prepared, num_experts, self.device)
            else:
                sums = L1Sums(prepared, num_experts, self.device)
            for chunk in self._chunks(recipe, block, lane):
                base = base_of(recipe, prepared, chunk)
                if is_scored(recipe):
                    deltas, nonfinite = deltas_of(recipe, prepared, chunk)
                    num_nonfinite += nonfinite
                    key = magnitude_bits(scores_of(recipe, base, deltas))
                    sums.add(0, key, None if recipe.settings.drop == "importance" else key != 0)
                    continue
                for m in range(num_experts):
                    delta, finite = delta_of(recipe, prepared, chunk, base, m)
                    num_nonfinite[m] += finite.logical_not().sum()
                    keep = None
                    if isinstance(sums, L1Sums):
                        keep, _ = drop(recipe, prepared, chunk.start, m, delta)
                    sums.add(m, magnitude_bits(delta), keep)
            return sums.measurement(num_nonfinite.cpu().numpy())

    def _measure_together(
        self,
        recipe: TensorRecipe,
        prepared: Multiplying | Squaring | Counting,
        block: Block,
        lane: Lane,
    ) -> Multiplied | Counted:
        """Return the products of deltas, the squares of what is kept, or what experts share."""
        num_experts = len(block.experts)
        num_nonfinite = torch.zeros(num_experts, dtype=torch.int64, device=self.device)
        counts = torch.zeros((2, num_experts), dtype=torch.int64, device=self.device)
        squares = isinstance(prepared, Squaring)
        products = ProductSums(num_experts, row_view(recipe).unit, squares=squares)
        for chunk in self._chunks(recipe, block, lane):
            deltas, nonfinite = deltas_of(recipe, prepared, chunk)
            num_nonfinite += nonfinite
            if not isinstance(prepared, Multiplying):
                self._drop(recipe, prepared, chunk, deltas)
            if not isinstance(prepared, Counting):
                products.add(deltas)
                continue
            present = torch.stack([delta != 0 for delta in deltas])
            is_shared = present.sum(dim=0) > 1
            counts[0] += (present & is_shared).sum(dim=1)
            counts[1] += (present & ~is_shared).sum(dim=1)
        found = num_nonfinite.cpu().numpy()
        if not isinstance(prepared, Counting):
            return multiplied(found, products.sums())
        shared, unique = counts.cpu().numpy()
        return Counted(found, shared, unique)

    def _drop(
        self,
        recipe: TensorRecipe,
        prepared: Squaring | Counting,
        chunk: Chunk,
        deltas: list[torch.Tensor],
    ) -> None:
        """Make zeros of the deltas that are dropped."""
        mask = None
        if is_scored(recipe):
            scores = scores_of(recipe, base_of(recipe, prepared, chunk), deltas)
            mask = magnitude_bits(scores) >= prepared.threshold[0]
        for m, delta in enumerate(deltas):
            keep = drop(recipe, prepared, chunk.start, m, delta)[0] if mask is None else mask
            deltas[m] = delta if keep is None else torch.where(keep, delta, 0.0)

    def merge(
        self, recipe: TensorRecipe, prepared: Ready, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        view = row_view(recipe)
        size = itemsize(recipe.out_dtype)
        with self._lane(recipe, block) as lane:
            tally = Tally(len(block.experts), self.device)
            for chunk in self._chunks(recipe, block, lane):
                bits = merge_chunk(recipe, prepared, view, chunk, tally)
                begin = (chunk.start - block.start) * size
                end = (chunk.stop - block.start) * size
                chunk.slot.download(bits.view(torch.uint8), out[begin:end], lane)
            return tally.block_stats(elect=recipe.settings.elect)

    @contextlib.contextmanager
    def _lane(self, recipe: TensorRecipe, block: Block) -> Iterator[Lane]:
        size = chunk_size(recipe, block.stop - block.start, self._has)
        large = is_large(size, self._has)
        with memory_of(recipe.name), self._staging.lane(size.slot_need, is_large=large) as lane:
            yield lane

    def _chunks(self, recipe: TensorRecipe, block: Block, lane: Lane) -> Iterator[Chunk]:
        num = block.stop - block.start
        raws = block.experts if block.base is None else (block.base, *block.experts)

        def parts(start: int, stop: int) -> Sequence[U8Array]:
            return [_part(raw, num, start, stop) for raw in raws]

        step = chunk_size(recipe, num, self._has).elements
        for start, stop, slot, there in lane.chunks(parts, num, step):
            base = None if block.base is None else there.pop(0)
            yield Chunk(block.start + start, block.start + stop, base, tuple(there), slot)


def _part(raw: U8Array, num: int, start: int, stop: int) -> U8Array:
    """Return the bytes of elements `start` to `stop` of `num`."""
    size = raw.size // num
    return raw[start * size : stop * size]


def _allow(device: torch.device, gpu_memory: int | None) -> int:
    """Bound what this process takes on a CUDA device; return how much that is."""
    free, total = torch.cuda.mem_get_info(device)
    if gpu_memory is None:
        gpu_memory = int(free * FREE_SHARE)
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / total), number)
    return gpu_memory
