"""The records of committed tasks, packed: a model has a hundred thousand tensors and more."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator

from della_dist.runtime.task.merge import TaskRecord
from della_dist.specs.history import Spent, TaskRun
from della_dist.storage.manifest import FileRecord, TensorRecord


class CommittedTasks:
    """Committed tasks by index.

    As objects, the record of a tensor merged from three experts takes a kilobyte; packed, a tenth
    of that.
    """

    def __init__(self) -> None:
        self._packed: dict[int, tuple[FileRecord, bytes]] = {}
        self._runs: dict[int, tuple[Spent | None, TaskRun | None]] = {}

    def add(self, record: TaskRecord) -> None:
        """Take in a task."""
        # Bytes of this very process: nothing is unpickled that came from outside of it.
        packed = zlib.compress(pickle.dumps(record, pickle.HIGHEST_PROTOCOL), 1)
        self._packed[record.index] = (record.shard, packed)
        self._runs[record.index] = (record.spent, record.run)

    def __contains__(self, index: int) -> bool:
        return index in self._packed

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[TaskRecord]:
        """Yield the records in order of their index, each made anew."""
        for index in sorted(self._packed):
            record: TaskRecord = pickle.loads(zlib.decompress(self._packed[index][1]))
            yield record

    def shards(self) -> list[FileRecord]:
        """Return the files of the shards, in order."""
        return [self._packed[index][0] for index in sorted(self._packed)]

    def runs(self) -> Iterator[tuple[int, int, Spent | None, TaskRun | None]]:
        """Yield of each shard its index, its size in bytes, what it took, and when and by whom."""
        for index in sorted(self._packed):
            yield index, self._packed[index][0].size_bytes, *self._runs[index]

    def tensors(self) -> Iterator[TensorRecord]:
        """Yield the records of all tensors, in the order of the shards."""
        for record in self:
            yield from record.tensors
