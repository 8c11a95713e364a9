"""Read a sample of the models of a plan, and add up how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from della_dist.locations import is_url
from della_dist.ops.similarity import Sums, block_sums, total
from della_dist.planning.build import MergePlan
from della_dist.planning.sampling import BLOCK_ELEMENTS, Sample
from della_dist.runtime.budget import MAX_CONNECTIONS, available_cores
from della_dist.runtime.task.blas import few_blas_threads
from della_dist.runtime.task.columns import open_columns
from della_dist.runtime.task.inputs import InputReaders, InputStores
from della_dist.runtime.task.meter import Meter
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.local.bus_errors import survived

#: Tensors that are read at once where some are remote, each of which asks all models at once.
_AT_ONCE = 16

#: What all of them hold at most, if one alone does not hold more; and as much again is read ahead.
_HELD_BYTES = 16 << 20

#: Arrays of float64 that are made of a block, for each model.
_ARRAYS = 4


@dataclass(frozen=True, slots=True)
class Compared:
    """A sample, and what was added up of it."""

    found: tuple[tuple[Sample, Sums], ...]
    bytes_read: int


@survived()
def compare(
    plan: MergePlan, samples: Sequence[Sample], output: CheckpointIndex | None = None
) -> Compared:
    """Return the sums over samples of a plan.

    Parameters
    ----------
    plan
        Whose checkpoints they are of.
    samples
        What to look at.
    output
        The checkpoint behind those of the plan that samples speak of.

    Raises
    ------
    InputChangedError
        If a file is no longer the one that was planned.
    StorageError
        If one cannot be read.
    """
    inputs = plan.inputs if output is None else (*plan.inputs, output)
    is_remote = any(is_url(checkpoint.location) for checkpoint in inputs)
    meter = Meter()
    stores = InputStores(MAX_CONNECTIONS)
    at_once = _AT_ONCE if is_remote else available_cores()
    threads = max(1, min(at_once, _HELD_BYTES // max(map(_held_bytes, samples), default=1)))
    with (
        few_blas_threads(),
        InputReaders(inputs, stores, meter.read, _HELD_BYTES) as readers,
        ThreadPoolExecutor(threads) as pool,
    ):
        sums = list(pool.map(lambda sample: _sums(readers, sample), samples))
    return Compared(tuple(zip(samples, sums, strict=True)), meter.snapshot().bytes_read)


def _held_bytes(sample: Sample) -> int:
    """Return about what is held of a sample at once; numbers beside blocks become float32."""
    block = BLOCK_ELEMENTS * 8 * _ARRAYS * len(sample.source.experts)
    return block + 3 * sample.beside_bytes


def _sums(readers: InputReaders, sample: Sample) -> Sums:
    columns = open_columns(readers, sample.source)
    dtypes = [column.dtype for column in sample.source.experts]
    blocks = []
    for start, stop in sample.spans[:1]:
        columns.prefetch(start, stop)
    for i, (start, stop) in enumerate(sample.spans):
        for ahead in sample.spans[i + 1 : i + 2]:
            columns.prefetch(*ahead)
        reference, *models = columns.views(start, stop)
        blocks.append(block_sums(reference, dtypes[0], models, dtypes[1:], sample.is_delta))
        columns.release(start, stop)
    return total(blocks)
