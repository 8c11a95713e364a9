"""The output directory: what is committed, what a rerun may continue, and how it is completed.

While a run is unfinished its records are in ``.della/``::

    .della/lock             held by the running driver, and by nobody once that is dead
    .della/plan.json        the identity of the run
    .della/tasks/00000.json a committed task: its shard's checksum, its tensors
    .della/tmp/             files that are being written

Shards get their names when they are complete and on the disk. Index, configuration, tokenizer and
model card follow when all of them are; the manifest is last, and then ``.della/`` goes away.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from della_dist.errors import OutputError, StorageError, refused_as
from della_dist.locations import short_names
from della_dist.plan.build import MergePlan
from della_dist.plan.fingerprint import fingerprint, identity
from della_dist.plan.layout import INDEX_NAME, weight_map
from della_dist.report.card import model_card
from della_dist.runtime.companions import CompanionFile
from della_dist.runtime.worker import TaskRecord
from della_dist.specs import num_elements
from della_dist.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TENSORS_NAME,
    FileRecord,
    TensorRecord,
    dump_manifest,
    dump_tensors,
    file_record,
    model_digest,
    tensor_from_json,
    tensor_to_json,
)
from della_dist.storage.opening import DEFAULT_CONNECTIONS
from della_dist.storage.store import STATE_PREFIX, Lease, Store
from della_dist.version import __version__

PLAN_KEY = f"{STATE_PREFIX}plan.json"
TASKS = f"{STATE_PREFIX}tasks"

#: Room that the small files need, beyond the shards.
SLACK_BYTES = 8 << 20


class Output:
    """The output directory of one run.

    Made by `open_output`, which has checked that the directory may be used; nothing is written
    before `begin`.
    """

    def __init__(
        self,
        store: Store,
        plan: MergePlan,
        committed: dict[int, TaskRecord] | None = None,
        discard: Sequence[str] | None = None,
    ) -> None:
        self.store = store
        self.plan = plan
        self.committed = committed or {}
        self._identity = identity(plan)
        self._fresh = committed is None
        self._discard = discard
        self._seen = self._state()
        self._restore_root = store.remember_root()
        self._lease: Lease | None = None

    @property
    def remaining(self) -> list[int]:
        """Indexes of the tasks that are not committed yet."""
        return [i for i in range(len(self.plan.shards)) if i not in self.committed]

    def check_room(self) -> None:
        """Check that the disk has room for what is still to be written.

        Raises
        ------
        StorageError
            Stating both numbers, if it has not.
        """
        needed = sum(self.plan.shards[i].size_bytes for i in self.remaining) + SLACK_BYTES
        free = self.store.free_bytes()
        if free is not None and free < needed:
            raise StorageError(
                f"{self.store.location} has room for {free} bytes, but {needed} are still to be "
                "written. Make room there and run the same command again, or choose another output."
            )

    def begin(self) -> None:
        """Take the lock and record the plan.

        Raises
        ------
        OutputError
            If the output cannot be written to, or another driver is working on it, or was since it
            was looked at.
        StorageError
            If the disk has too little room.
        """
        if self._fresh and self._discard is None:
            self.check_room()
        with refused_as(OutputError, f"the output {self.store.location}"):
            self._lease = self.store.lock(_owner())
        if self._state() != self._seen:
            self.close()
            raise OutputError(
                f"{self.store.location} was written by another run just now. Run the same command "
                "again to see where it stands."
            )
        self.store.clear_staging()
        if self._discard is not None:
            self._discard_old(self._discard)
        self.check_room()  # again, now that the leavings of an earlier run are gone
        if self._fresh:
            self.store.put(PLAN_KEY, _json({"identity": self._identity}))

    def _state(self) -> tuple[bool, bool]:
        return self.store.exists(MANIFEST_NAME), self.store.exists(PLAN_KEY)

    def _discard_old(self, names: Sequence[str]) -> None:
        # First a note of what is to go: killed on the way, the next run goes on discarding. Then
        # the manifest: from there on the output is visibly unfinished.
        note = {"identity": self._identity, "discarding": list(names)}
        self.store.put(PLAN_KEY, _json(note))
        for name in (MANIFEST_NAME, *names, *self.store.list(f"{TASKS}/")):
            self.store.delete(name)

    def commit(self, record: TaskRecord) -> None:
        """Record a task whose shard is complete; from here on no rerun repeats it.

        Raises
        ------
        RunError
            If another run has taken the output over.
        """
        assert self._lease is not None
        self._lease.check()
        content = {
            "index": record.index,
            "name": record.shard.name,
            "size_bytes": record.shard.size_bytes,
            "sha256": record.shard.sha256,
            "tensors": [tensor_to_json(t) for t in record.tensors],
        }
        self.store.put(f"{TASKS}/{record.index:05d}.json", _json(content))
        self.committed[record.index] = record

    def finish(self, companions: Sequence[CompanionFile]) -> str:
        """Write everything but the shards, the manifest last; return the model digest.

        Parameters
        ----------
        companions
            Configuration and tokenizer files to carry over.
        """
        assert self._lease is not None
        self._lease.check()
        plan = self.plan
        records = [self.committed[i] for i in range(len(plan.shards))]
        tensors = [t for record in records for t in record.tensors]
        digest = model_digest(tensors)
        files = [*companions, *self._index()]
        experts = short_names([c.location for c in plan.inputs])[-len(plan.experts) :]
        files.append(CompanionFile(TENSORS_NAME, dump_tensors(tensors, experts)))
        card = model_card(plan, digest, num_parameters=_parameters(tensors))
        files.append(CompanionFile("README.md", card.encode()))
        for file in files:
            self.store.put(file.name, file.data)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "della_dist", "version": __version__},
            "fingerprint": fingerprint(self._identity),
            "seed": plan.config.seed,
            **self._identity,
            "num_tensors": len(tensors),
            "num_parameters": _parameters(tensors),
            "shards": [_file(r.shard) for r in records],
            "files": [_file(file_record(f.name, f.data)) for f in files],
            "model_digest": digest,
        }
        self._lease.check()
        self.store.put(MANIFEST_NAME, dump_manifest(manifest))
        self._lease.check()
        self.store.clear_staging()  # of attempts whose workers died
        self.store.delete_state()
        self.close()  # not before: another run may begin now
        return digest

    def _index(self) -> list[CompanionFile]:
        if len(self.plan.shards) == 1:
            return []
        content = {
            "metadata": {"total_size": self.plan.output_bytes},
            "weight_map": weight_map(self.plan.shards),
        }
        return [CompanionFile(INDEX_NAME, (json.dumps(content, indent=2) + "\n").encode())]

    def discard_if_fresh(self) -> None:
        """Remove what this run wrote, if it began it: for inputs that turn out to be wrong.

        What is committed cannot be continued once the inputs or the configuration are mended, since
        the run is another one then. A run that was resumed is left as it is, and so is one that
        another driver has taken over.
        """
        if self._fresh and self._lease is not None and self.store.is_held(self._lease.token):
            for shard in self.plan.shards:
                self.store.delete(shard.name)
            self.store.delete_state()
            self.close()
            self._restore_root()

    @property
    def lease_token(self) -> str:
        """What workers ask the store with whether this run still has the output."""
        assert self._lease is not None
        return self._lease.token

    def close(self) -> None:
        """Release the lease."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def tidy(store: Store) -> None:
    """Remove the records that a run left behind which was killed right after the manifest."""
    if store.has_state():
        with store.lock(_owner()):
            store.delete_state()


def read_record(store: Store, key: str) -> dict[str, Any]:
    """Return a record of an unfinished run.

    Raises
    ------
    OutputError
        If it is damaged.
    """
    try:
        content = json.loads(store.read(key))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise OutputError(
            f"{store.describe(key)} is damaged, so that the run it belongs to cannot be continued. "
            "Discard what it left with --restart."
        )
    return content


def committed_tasks(store: Store, plan: MergePlan) -> dict[int, TaskRecord]:
    """Return the tasks of an unfinished run whose record and whose shard are both there."""

    def read(key: str) -> TaskRecord | None:
        content = read_record(store, key)
        shard = FileRecord(content["name"], content["size_bytes"], content["sha256"])
        if store.exists(shard.name) and store.stat(shard.name).size_bytes == shard.size_bytes:
            tensors = tuple(tensor_from_json(t) for t in content["tensors"])
            return TaskRecord(content["index"], shard, tensors)
        return None

    with ThreadPoolExecutor(DEFAULT_CONNECTIONS) as pool:  # remote records take round trips
        found = pool.map(read, store.list(f"{TASKS}/"))
        committed = {record.index: record for record in found if record is not None}
    assert all(plan.shards[i].name == r.shard.name for i, r in committed.items())
    return committed


def _owner() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _parameters(tensors: Sequence[TensorRecord]) -> int:
    return sum(num_elements(t.shape) for t in tensors)


def _file(record: FileRecord) -> dict[str, Any]:
    return {"name": record.name, "size_bytes": record.size_bytes, "sha256": record.sha256}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
