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

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from della_dist import __version__
from della_dist.errors import OutputError, StorageError, VerificationError
from della_dist.plan.build import MergePlan
from della_dist.plan.fingerprint import explain_difference, fingerprint, identity
from della_dist.plan.layout import INDEX_NAME, is_shard_name, weight_map
from della_dist.report.card import model_card
from della_dist.runtime.companions import CompanionFile, is_companion
from della_dist.runtime.worker import TaskRecord
from della_dist.specs import num_elements
from della_dist.storage.local import LocalLock, LocalStore
from della_dist.storage.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TENSORS_NAME,
    FileRecord,
    TensorRecord,
    dump_manifest,
    dump_tensors,
    file_record,
    load_manifest,
    model_digest,
    tensor_from_json,
    tensor_to_json,
)

RECORDS = ".della"
PLAN_KEY = f"{RECORDS}/plan.json"
TASKS = f"{RECORDS}/tasks"

#: Room that the small files need, beyond the shards.
SLACK_BYTES = 8 << 20


class Output:
    """The output directory of one run.

    Made by `open_output`, which has checked that the directory may be used; nothing is written
    before `begin`.
    """

    def __init__(
        self, store: LocalStore, plan: MergePlan, committed: dict[int, TaskRecord]
    ) -> None:
        self.store = store
        self.plan = plan
        self.committed = committed
        self._identity = identity(plan)
        self._fresh = not store.exists(PLAN_KEY)
        self._missing = [p for p in (store.root, *store.root.parents) if not p.exists()]
        self._lock: LocalLock | None = None

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
        if free < needed:
            raise StorageError(
                f"{self.store.root} has room for {free} bytes, but {needed} are still to be "
                "written. Make room there and run the same command again, or choose another output."
            )

    def begin(self) -> None:
        """Take the lock and record the plan.

        Raises
        ------
        OutputError
            If another driver is working on this output, or was since it was looked at.
        StorageError
            If the disk has too little room.
        """
        if self._fresh:
            self.check_room()
        self._lock = self.store.lock(_owner())
        if self.store.exists(MANIFEST_NAME) or self.store.exists(PLAN_KEY) == self._fresh:
            self.close()
            raise OutputError(
                f"{self.store.root} was written by another run just now. Run the same command "
                "again to see where it stands."
            )
        self.store.clear_staging()
        self.check_room()  # again, now that the leavings of a killed run are gone
        if self._fresh:
            plan_json = {"fingerprint": fingerprint(self._identity), "identity": self._identity}
            self.store.put(PLAN_KEY, _json(plan_json))

    def commit(self, record: TaskRecord) -> None:
        """Record a task whose shard is complete; from here on no rerun repeats it."""
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
        plan = self.plan
        records = [self.committed[i] for i in range(len(plan.shards))]
        tensors = [t for record in records for t in record.tensors]
        digest = model_digest(tensors)
        files = [*companions, *self._index()]
        files.append(CompanionFile(TENSORS_NAME, dump_tensors(tensors)))
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
        self.store.put(MANIFEST_NAME, dump_manifest(manifest))
        self.close()
        self.store.delete_state()
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
        the run is another one then. A run that was resumed is left as it is.
        """
        if self._fresh and self._lock is not None:
            for shard in self.plan.shards:
                if self.store.exists(shard.name):
                    self.store.delete(shard.name)
            self.close()
            self.store.delete_state()
            for path in self._missing:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    path.rmdir()
            if not self._missing:
                self.store.root.mkdir(exist_ok=True)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def open_output(location: Path, plan: MergePlan, *, restart: bool) -> Output | dict[str, Any]:
    """Look at the output directory and decide what a run of `plan` may do there. Writes nothing.

    Returns the output to run, or the manifest if this very merge is already complete there.

    Raises
    ------
    OutputError
        If the output is an input or lies in one, holds something else, or belongs to another run
        (unless `restart`, which discards what della_dist wrote there and nothing else).
    """
    _refuse_overlap(location, plan)
    _refuse_no_directory(location)
    store = LocalStore(location)
    if not location.exists() or not any(location.iterdir()):
        return Output(store, plan, {})
    if store.exists(MANIFEST_NAME):
        try:
            manifest = load_manifest(store.read(MANIFEST_NAME))
        except VerificationError as error:
            raise OutputError(f"{location / MANIFEST_NAME}: {error}") from error
        if restart:
            _discard(store, [f["name"] for f in (*manifest["shards"], *manifest["files"])])
            return Output(store, plan, {})
        _refuse_other(location, {k: manifest.get(k) for k in identity(plan)}, plan, "holds")
        return manifest
    if not store.exists(PLAN_KEY):
        if {p.name for p in location.iterdir()} == {RECORDS}:
            return Output(store, plan, {})  # killed between taking the lock and recording the plan
        raise OutputError(
            f"{location} is not empty and was not written by della-dist. Choose a new directory, "
            "or empty this one."
        )
    if restart:
        _discard(store, [name for name in store.list() if _is_ours(name)])
        return Output(store, plan, {})
    recorded = _record(store, PLAN_KEY)
    _refuse_other(location, recorded["identity"], plan, "holds an unfinished run of")
    return Output(store, plan, _committed(store, plan))


def _refuse_other(location: Path, recorded: Mapping[str, Any], plan: MergePlan, holds: str) -> None:
    differences = explain_difference(dict(recorded), identity(plan))
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise OutputError(
            f"{location} {holds} another merge: {shown}. Choose another output, or discard this "
            "one with --restart."
        )


def _committed(store: LocalStore, plan: MergePlan) -> dict[int, TaskRecord]:
    """Return the tasks whose record and whose shard are both there."""
    committed = {}
    for key in store.list(f"{TASKS}/"):
        content = _record(store, key)
        shard = FileRecord(content["name"], content["size_bytes"], content["sha256"])
        if store.exists(shard.name) and store.stat(shard.name).size_bytes == shard.size_bytes:
            tensors = tuple(tensor_from_json(t) for t in content["tensors"])
            committed[content["index"]] = TaskRecord(content["index"], shard, tensors)
    assert all(plan.shards[i].name == r.shard.name for i, r in committed.items())
    return committed


def _record(store: LocalStore, key: str) -> dict[str, Any]:
    try:
        content = json.loads(store.read(key))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise OutputError(
            f"{store.path(key)} is damaged, so that the run it belongs to cannot be continued. "
            "Discard what it left with --restart."
        )
    return content


def _is_ours(name: str) -> bool:
    """Tell whether an unfinished run may have written a file; the directory was empty before it."""
    fixed = (INDEX_NAME, TENSORS_NAME, "README.md")
    return name in fixed or is_shard_name(name) or is_companion(name)


def _discard(store: LocalStore, names: Sequence[str]) -> None:
    with store.lock(_owner()):
        # The manifest goes first: from then on the output is visibly unfinished.
        for name in (MANIFEST_NAME, *names):
            if store.exists(name):
                store.delete(name)
        store.delete_state()


def _refuse_no_directory(location: Path) -> None:
    nearest = location
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if location.is_file():
        raise OutputError(f"{location} is a file. The output must be a new or empty directory.")
    if not nearest.is_dir():
        raise OutputError(
            f"{location} cannot be made: {nearest} is not a directory, or a link to nothing. "
            "Choose another output."
        )


def _refuse_overlap(location: Path, plan: MergePlan) -> None:
    real = location.resolve()
    for checkpoint in plan.inputs:
        source = Path(checkpoint.location).resolve()
        if real == source or source in real.parents or real in source.parents:
            raise OutputError(
                f"the output {location} and the input {checkpoint.location} overlap. Write the "
                "output to a directory of its own."
            )


def _owner() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _parameters(tensors: Sequence[TensorRecord]) -> int:
    return sum(num_elements(t.shape) for t in tensors)


def _file(record: FileRecord) -> dict[str, Any]:
    return {"name": record.name, "size_bytes": record.size_bytes, "sha256": record.sha256}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
