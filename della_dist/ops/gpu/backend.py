"""The pipeline in torch: written for CUDA, runs on any device that has float64.

Every operation on floating-point numbers that can reach the output is elementwise and a kernel of
its own, so that nothing is reordered and no multiplication and addition are contracted:

* no ``alpha=``, ``addcmul``, ``cumsum``, ``matmul``; reductions are over integers only;
* a divisor is a tensor on the device, never a Python number: CUDA would multiply by its
  reciprocal;
* Python numbers that take part are already rounded to the compute dtype.

Blocks are worked through in chunks of whole units, which bounds the device memory. On CUDA the
host copies the next chunk into pinned memory while the device computes; at most two chunks are
under way, and torch's caching allocators hand their buffers on from chunk to chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from della_dist.ops.angles import row_weights_bytes, weights_from_products
from della_dist.ops.blocks import SQUARES_SUMS, Block, BlockStats, U8Array
from della_dist.ops.gpu.convert import count_overflow, narrow, widen
from della_dist.ops.gpu.measure import L1Sums, ProductSums, SelectCounts
from della_dist.ops.gpu.scores import importances, variances
from della_dist.ops.gpu.stats import Tally, magnitude_bits
from della_dist.ops.gpu.steps import compute_dtype, drop, fuse, round_to_compute
from della_dist.ops.measurements import Counted, Measurement, Multiplied, multiplied
from della_dist.ops.prepare import (
    Counting,
    Multiplying,
    Pending,
    Prepared,
    Ready,
    Selecting,
    Squaring,
    Summing,
)
from della_dist.specs.dtypes import itemsize
from della_dist.specs.passes import gathered_bytes, is_scored, multiplies, searches, selects
from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import RowView, row_view

#: Elements worked on at a time, unless one unit is larger.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}

#: Bytes an element that do not depend on the recipe: ranks (int64 and float64), random words.
_RANK_BYTES = 96


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The inputs of elements ``start`` to ``stop`` on the device. n = stop - start."""

    start: int
    stop: int
    base: torch.Tensor | None
    """(n * itemsize,) uint8."""
    experts: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Download:
    """A piece of the output that is on its way to the host."""

    host: torch.Tensor
    """uint8, pinned where the device is CUDA."""
    event: Any
    """The `torch.cuda.Event` after which `host` is complete; None where it is already."""
    out: U8Array
    """Where it belongs."""

    def finish(self) -> None:
        """Wait for the bytes and put them where they belong."""
        if self.event is not None:
            self.event.synchronize()
        np.copyto(self.out, self.host.numpy())


class TorchBackend:
    """Merges blocks on a torch device; equal to the byte to every other backend."""

    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._on_cuda = self.device.type == "cuda"

    def scratch_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes one call needs beyond the block itself and its output.

        This many on the device, and on CUDA at most as many of pinned host memory. torch's
        caching allocators may hold on to more than is in use.
        """
        dtypes = recipe.expert_dtypes
        if recipe.base_dtype is not None:
            dtypes = (recipe.base_dtype, *dtypes)
        compute = 8 if is_wide(recipe) else 4
        num_experts = len(recipe.expert_dtypes)
        raw = sum(map(itemsize, (*dtypes, recipe.out_dtype)))
        # Contributions of every expert, base, sums, and what one expert's drop step holds.
        per_element = raw + compute * (num_experts + 6) + _RANK_BYTES
        view = row_view(recipe)
        if recipe.settings.angles is not None:
            # Every expert's deltas as float64, in rows of at least 16, and a product.
            cols = max(1, view.num_cols)
            widened = -(-cols // SQUARES_SUMS) * SQUARES_SUMS / cols
            per_element += math.ceil(8 * widened * (num_experts + 2))
        if recipe.settings.drop == "variance" or recipe.settings.overlap is not None:
            # Every expert's deltas, and a mean and sums as float64; squares as above.
            per_element += (8 + compute) * (num_experts + 6) + 8 * num_experts * SQUARES_SUMS
        if recipe.settings.drop == "importance":
            # Both rows, their exponentials, in rows of at least 16, and a sum, as float64.
            cols = max(1, view.num_cols)
            widened = -(-cols // SQUARES_SUMS) * SQUARES_SUMS / cols
            per_element += math.ceil(8 * (12 + widened)) + compute * num_experts
        elements = min(max(block_elements, view.unit), self._chunk_elements(view))
        elements = min(elements, max(view.num_elements, 1))
        tables = 0
        if selects(recipe) or recipe.settings.rescale == "l1":
            tables = 65_537 * 8 * 8 * max(num_experts, len(searches(recipe)))
        tables += gathered_bytes(recipe) * multiplies(recipe)
        tables += row_weights_bytes(recipe, block_elements)
        return elements * per_element + tables + (1 << 16)

    def measure(self, recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        num_experts = len(block.experts)
        num_nonfinite = torch.zeros(num_experts, dtype=torch.int64, device=self.device)
        if isinstance(prepared, Multiplying):
            products = ProductSums(num_experts, row_view(recipe).unit)
            for chunk in self._chunks(row_view(recipe), block):
                deltas, finite = _deltas(recipe, prepared, chunk)
                num_nonfinite += torch.stack([f.logical_not().sum() for f in finite])
                products.add(deltas)
            return multiplied(num_nonfinite.cpu().numpy(), products.sums())
        if isinstance(prepared, (Squaring, Counting)):
            return self._measure_kept(recipe, prepared, block)
        sums: SelectCounts | L1Sums
        match prepared:
            case Selecting():
                sums = SelectCounts(prepared, num_experts, self.device)
            case Summing():
                sums = L1Sums(prepared, num_experts, self.device)
        for chunk in self._chunks(row_view(recipe), block):
            base = _base(recipe, prepared, chunk)
            if is_scored(recipe):
                deltas, finite_of = _deltas(recipe, prepared, chunk)
                num_nonfinite += torch.stack([f.logical_not().sum() for f in finite_of])
                key = magnitude_bits(_scores(recipe, base, deltas))
                sums.add(0, key if recipe.settings.drop == "importance" else key[key != 0], None)
                continue
            for m in range(num_experts):
                delta, finite = _delta(recipe, prepared, chunk, base, m)
                num_nonfinite[m] += finite.logical_not().sum()
                keep = None
                if isinstance(prepared, Summing):
                    keep, _ = drop(recipe, prepared, chunk.start, m, delta)
                sums.add(m, magnitude_bits(delta), keep)
        return sums.measurement(num_nonfinite.cpu().numpy())

    def _measure_kept(
        self, recipe: TensorRecipe, prepared: Squaring | Counting, block: Block
    ) -> Multiplied | Counted:
        """Return the squares of what is kept of a block, or what of it experts share."""
        num_experts = len(block.experts)
        num_nonfinite = torch.zeros(num_experts, dtype=torch.int64, device=self.device)
        counts = torch.zeros((2, num_experts), dtype=torch.int64, device=self.device)
        products = ProductSums(num_experts, row_view(recipe).unit, squares=True)
        for chunk in self._chunks(row_view(recipe), block):
            base = _base(recipe, prepared, chunk)
            deltas, finite = _deltas(recipe, prepared, chunk)
            num_nonfinite += torch.stack([f.logical_not().sum() for f in finite])
            mask = None
            if is_scored(recipe):
                mask = magnitude_bits(_scores(recipe, base, deltas)) >= prepared.threshold[0]
            for m, delta in enumerate(deltas):
                keep = drop(recipe, prepared, chunk.start, m, delta)[0] if mask is None else mask
                deltas[m] = delta if keep is None else torch.where(keep, delta, 0.0)
            if isinstance(prepared, Squaring):
                products.add(deltas)
                continue
            present = torch.stack([delta != 0 for delta in deltas])
            is_shared = present.sum(dim=0) > 1
            counts[0] += (present & is_shared).sum(dim=1)
            counts[1] += (present & ~is_shared).sum(dim=1)
        found = num_nonfinite.cpu().numpy()
        if isinstance(prepared, Squaring):
            return multiplied(found, products.sums())
        shared, unique = counts.cpu().numpy()
        return Counted(found, shared, unique)

    def merge(
        self, recipe: TensorRecipe, prepared: Ready, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        view = row_view(recipe)
        size = itemsize(recipe.out_dtype)
        tally = Tally(len(block.experts), self.device)
        pending: _Download | None = None
        for chunk in self._chunks(view, block):
            bits = _merge_chunk(recipe, prepared, view, chunk, tally)
            begin = (chunk.start - block.start) * size
            end = (chunk.stop - block.start) * size
            download = self._download(bits, out[begin:end])
            if pending is not None:
                pending.finish()
            pending = download
        if pending is not None:
            pending.finish()
        return tally.block_stats(elect=recipe.settings.elect)

    def _chunk_elements(self, view: RowView) -> int:
        limit = CHUNK_ELEMENTS["cuda" if self._on_cuda else "cpu"]
        return view.unit * max(1, limit // view.unit)

    def _chunks(self, view: RowView, block: Block) -> Iterator[_Chunk]:
        num = block.stop - block.start
        step = self._chunk_elements(view)
        for begin in range(0, num, step):
            end = min(begin + step, num)
            base = None if block.base is None else self._upload(block.base, begin, end, num)
            experts = tuple(self._upload(e, begin, end, num) for e in block.experts)
            yield _Chunk(block.start + begin, block.start + end, base, experts)

    def _upload(self, raw: U8Array, begin: int, end: int, num: int) -> torch.Tensor:
        """Copy elements `begin` to `end` of `num` to the device, by way of an aligned buffer."""
        size = raw.size // num
        host = torch.empty((end - begin) * size, dtype=torch.uint8, pin_memory=self._on_cuda)
        np.copyto(host.numpy(), raw[begin * size : end * size])
        return host.to(self.device, non_blocking=True)

    def _download(self, bits: torch.Tensor, out: npt.NDArray[Any]) -> _Download:
        source = bits.view(torch.uint8)
        if not self._on_cuda:
            return _Download(source.cpu(), None, out)
        host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True)
        host.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _Download(host, event, out)


def _base(recipe: TensorRecipe, prepared: Prepared, chunk: _Chunk) -> torch.Tensor:
    if chunk.base is None or recipe.base_dtype is None:
        return torch.zeros(
            chunk.stop - chunk.start,
            dtype=compute_dtype(prepared),
            device=chunk.experts[0].device,
        )
    return widen(chunk.base, recipe.base_dtype, compute_dtype(prepared))


def _delta(
    recipe: TensorRecipe, prepared: Prepared, chunk: _Chunk, base: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert `m`'s deltas, zero where they are not finite, and where they are finite."""
    # No delta is finite where the base is not.
    start = base - base if recipe.is_delta[m] else base
    delta = widen(chunk.experts[m], recipe.expert_dtypes[m], compute_dtype(prepared)) - start
    finite = torch.isfinite(delta)
    return torch.where(finite, delta, 0.0), finite


def _deltas(
    recipe: TensorRecipe, prepared: Prepared, chunk: _Chunk
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every expert's deltas, and where they are finite."""
    base = _base(recipe, prepared, chunk)
    pairs = [_delta(recipe, prepared, chunk, base, m) for m in range(len(chunk.experts))]
    return [delta for delta, _ in pairs], [finite for _, finite in pairs]


def _row_weights(
    recipe: TensorRecipe, view: RowView, deltas: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the weights of a chunk's elements, (M, n), where every row has its own."""
    products = ProductSums(len(deltas), view.num_cols)
    products.add(deltas)
    weights = torch.from_numpy(weights_from_products(recipe, products.sums()))
    weights = weights.to(deltas[0].dtype).to(deltas[0].device)
    return [w.repeat_interleave(view.num_cols) for w in weights]


def _scores(
    recipe: TensorRecipe, base: torch.Tensor, deltas: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return what decides which elements of a chunk are kept: (n,), numbers from 0 on."""
    if recipe.settings.drop == "variance":
        return variances(deltas)
    return importances(base, deltas[0], row_view(recipe).num_cols)


def _merge_chunk(
    recipe: TensorRecipe, prepared: Ready, view: RowView, chunk: _Chunk, tally: Tally
) -> torch.Tensor:
    """Return the bits of the merged chunk as integers, (n,), on the device."""
    settings = recipe.settings
    base = _base(recipe, prepared, chunk)
    contributions = []
    rows: Sequence[torch.Tensor] = ()
    if settings.angles is not None and settings.angles.by_row:
        rows = _row_weights(recipe, view, _deltas(recipe, prepared, chunk)[0])
    mask: torch.Tensor | None = None
    if is_scored(recipe):
        score = _scores(recipe, base, _deltas(recipe, prepared, chunk)[0])
        mask = magnitude_bits(score) >= prepared.threshold[0]
    for m in range(len(chunk.experts)):
        delta, finite = _delta(recipe, prepared, chunk, base, m)
        keep, probability = mask, None
        if mask is None:
            keep, probability = drop(recipe, prepared, chunk.start, m, delta)
        tally.add_delta(m, delta, finite, keep, view.unit)
        if settings.rescale == "inverse" and probability is not None:
            delta = delta / probability.to(delta.dtype)
        elif settings.rescale == "l1":
            delta = delta * prepared.ratio[m]
        if settings.limit is not None:
            limit = round_to_compute(prepared, settings.limit)
            delta = delta.clamp(-limit, limit)
        weight = 1.0 if settings.by_energy else round_to_compute(prepared, prepared.weights[m])
        v = delta * (rows[m] if rows else weight)
        contributions.append(v if keep is None else torch.where(keep, v, 0.0))
    fused = fuse(settings, prepared, contributions, tally)
    scaled = fused * round_to_compute(prepared, settings.lambda_)
    merged = base + scaled
    bits = narrow(merged, recipe.out_dtype)
    tally.add_overflow(count_overflow(base, bits, recipe.out_dtype))
    return bits
