"""The weights of a family: random, and a function of the seed and of their place alone."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from della_dist.planning.layout import INDEX_NAME, OutputTensor, lay_out, weight_map
from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.dtypes import num_elements
from della_dist.storage.header import build_header

F32Array = npt.NDArray[np.float32]

#: Elements that are made at once, a thread.
BLOCK_ELEMENTS = 1 << 19

BASE_STD = 0.02
#: Standard deviations of deltas, chosen for each tensor of each expert between these.
MIN_DELTA_STD, MAX_DELTA_STD = 1.5e-4, 6e-4
#: Of the deltas of one-dimensional tensors (norms), which are about 1.
NORM_DELTA_STD = 4e-3


def write_weights(
    folders: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    shard_size_bytes: int,
    seed: int,
) -> None:
    """Write the shards of all checkpoints side by side, and their indexes."""
    shards = lay_out([OutputTensor(n, dtype, s) for n, s in shapes.items()], shard_size_bytes)
    places = {name: i for i, name in enumerate(shapes)}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for shard in shards:
            entries = [(t.name, t.dtype, t.shape) for t in shard.tensors]
            header, ordered = build_header(entries, {"format": "pt"})
            tasks = (
                _BlockTask(seed, places[tensor.name], block, tensor, len(folders))
                for tensor in ordered
                for block in range(-(-num_elements(tensor.shape) // BLOCK_ELEMENTS))
            )
            with contextlib.ExitStack() as stack:
                outputs: list[BinaryIO] = [
                    stack.enter_context((folder / shard.name).open("wb")) for folder in folders
                ]
                for output in outputs:
                    output.write(header)
                for parts in _in_order(pool, tasks):
                    for output, part in zip(outputs, parts, strict=True):
                        output.write(part.data)
    index = {
        "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
        "weight_map": weight_map(shards),
    }
    for folder in folders if len(shards) > 1 else ():
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_order(
    pool: ThreadPoolExecutor, tasks: Iterator[_BlockTask]
) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield the results of tasks that run on all threads, few at a time."""
    window = (os.cpu_count() or 1) + 2
    running: deque[Future[list[npt.NDArray[Any]]]] = deque()
    for task in tasks:
        running.append(pool.submit(task.make))
        if len(running) >= window:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


@dataclass(frozen=True, slots=True)
class _BlockTask:
    """One block of one tensor, of every checkpoint of the family."""

    seed: int
    place: int
    block: int
    tensor: TensorEntry
    num_checkpoints: int

    def make(self) -> list[npt.NDArray[Any]]:
        """Return the stored values of the block: the base's, then each expert's."""
        start = self.block * BLOCK_ELEMENTS
        count = min(BLOCK_ELEMENTS, num_elements(self.tensor.shape) - start)
        store = _ROUNDERS[self.tensor.dtype]
        is_norm = len(self.tensor.shape) == 1
        base = _draw(self._random(0, self.block), _normal_quantiles(), count)
        base *= np.float32(BASE_STD)
        if is_norm:
            base += np.float32(1)
        stored, base = store(base)
        parts = [stored]
        for checkpoint in range(1, self.num_checkpoints):
            delta = _draw(self._random(checkpoint, self.block), _student_quantiles(), count)
            delta *= np.float32(NORM_DELTA_STD if is_norm else self._delta_std(checkpoint))
            delta += base
            parts.append(store(delta)[0])
        return parts

    def _random(self, checkpoint: int, block: int) -> np.random.Generator:
        return _generator(self.seed, self.place, checkpoint, block)

    def _delta_std(self, checkpoint: int) -> float:
        """Return a size that is the same for all blocks of one tensor of one expert."""
        place = _generator(self.seed, self.place, checkpoint).random()
        return float(MIN_DELTA_STD * (MAX_DELTA_STD / MIN_DELTA_STD) ** place)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))


#: Random values are drawn from this many quantiles of their distribution, which is fast.
NUM_QUANTILES = 1 << 16


def _mirrored(positive: npt.NDArray[np.float64]) -> F32Array:
    """Return the quantiles above the median and their negatives, scaled to a deviation of 1."""
    both = np.concatenate([-positive, positive])
    scaled: F32Array = (both / both.std()).astype(np.float32)
    return scaled


def _upper_probabilities() -> npt.NDArray[np.float64]:
    half = NUM_QUANTILES // 2
    return 0.5 + (np.arange(half) + 0.5) / NUM_QUANTILES


@functools.cache
def _normal_quantiles() -> F32Array:
    inverse = statistics.NormalDist().inv_cdf
    return _mirrored(np.array([inverse(p) for p in _upper_probabilities().tolist()]))


@functools.cache
def _student_quantiles() -> F32Array:
    """Return quantiles of Student's t with 4 degrees of freedom, which have a closed form."""
    p = _upper_probabilities()
    root = np.sqrt(4 * p * (1 - p))
    return _mirrored(2 * np.sqrt(np.cos(np.arccos(root) / 3) / root - 1))


def _draw(random: np.random.Generator, quantiles: F32Array, count: int) -> F32Array:
    drawn: F32Array = quantiles.take(random.integers(0, NUM_QUANTILES, count, dtype=np.uint16))
    return drawn


def _store_bf16(values: F32Array) -> tuple[npt.NDArray[Any], F32Array]:
    """Return the stored bits of `values` rounded to nearest even, and what they mean."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    stored = odd.astype("<u2")
    odd <<= 16
    return stored, odd.view(np.float32)


def _store_f16(values: F32Array) -> tuple[npt.NDArray[Any], F32Array]:
    stored = values.astype("<f2")
    return stored, stored.astype(np.float32)


def _store_f32(values: F32Array) -> tuple[npt.NDArray[Any], F32Array]:
    return values.astype("<f4", copy=False), values


_ROUNDERS: dict[str, Callable[[F32Array], tuple[npt.NDArray[Any], F32Array]]] = {
    "BF16": _store_bf16,
    "F16": _store_f16,
    "F32": _store_f32,
}
