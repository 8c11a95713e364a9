"""Which shards of an earlier run a rerun may keep: those that are still what their records say.

A shard that is not is merged again, and one line of the log says why. Nothing here is an error: the
worst that a damaged record costs is the work that it stands for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from della_dist.errors import VerificationError
from della_dist.planning.build import MergePlan
from della_dist.planning.layout import ShardLayout
from della_dist.runtime.output.checksums import file_sha256
from della_dist.runtime.output.committed import CommittedTasks
from della_dist.runtime.output.history import kept_history
from della_dist.runtime.output.records import CARD_NAME, TASKS, load_task, task_key
from della_dist.runtime.task.merge import TaskRecord, shard_entries
from della_dist.storage.header import build_header
from della_dist.storage.manifest import FileRecord, TensorRecord, file_record
from della_dist.storage.opening import DEFAULT_CONNECTIONS
from della_dist.storage.run_history import runs_of
from della_dist.storage.samples import sample_digest
from della_dist.storage.store import OutputStore, Store
from della_dist.storage.tensor_table import TENSORS_NAME, load_tensors

log = logging.getLogger("della_dist.run")

#: Shards read whole at once: more would only compete for the disk.
WHOLE_AT_ONCE = 4


def committed_tasks(store: OutputStore, plan: MergePlan, *, whole: bool) -> CommittedTasks:
    """Return the tasks of an unfinished run that need not be done again.

    Their records are intact and of this plan; their shards have the right size, header and sampled
    blocks. An object of which the store still has the version that was committed is not read.

    Parameters
    ----------
    store
        Of the output.
    plan
        Of this run, which has the identity of the unfinished one.
    whole
        Whether shards are read whole, and compared with their digests.
    """
    keys = {task_key(index): index for index in range(len(plan.shards))}
    there = [keys[key] for key in store.list(f"{TASKS}/") if key in keys]

    def look(index: int) -> TaskRecord | str:
        record = _read_task(store, task_key(index))
        if record is None:
            return "its record is damaged"
        return _fault(store, plan, index, record, whole=whole) or record

    return _keep(plan, there, look, whole=whole)


def recorded_shards(store: OutputStore) -> list[str]:
    """Return the names of the shards that an unfinished run committed, by its intact records."""

    def name(key: str) -> str | None:
        record = _read_task(store, key)
        return None if record is None else record.shard.name

    with ThreadPoolExecutor(DEFAULT_CONNECTIONS) as pool:  # remote records take round trips
        return [name for name in pool.map(name, store.list(f"{TASKS}/")) if name is not None]


def _read_task(store: Store, key: str) -> TaskRecord | None:
    """Return the record of a task, None if it is damaged."""
    try:
        return load_task(store.read(key))
    except ValueError:
        return None


def finished_tasks(
    store: OutputStore, plan: MergePlan, manifest: Mapping[str, Any], *, whole: bool
) -> CommittedTasks:
    """Return the tasks of a finished output whose shards are still there; see `committed_tasks`.

    What was measured on the tensors stands in the table alone: where that is gone, everything is
    merged again.
    """
    tensors = _table(store, manifest)
    if tensors is None:
        log.info(
            "%s is missing or damaged, and what it says of the tensors cannot be read off the "
            "shards: all are merged again",
            store.describe(TENSORS_NAME),
        )
        return CommittedTasks()
    files = {
        f["name"]: FileRecord(f["name"], f["size_bytes"], f["sha256"]) for f in manifest["shards"]
    }
    mine: dict[str, list[TensorRecord]] = {}
    for tensor in tensors:
        mine.setdefault(tensor.shard, []).append(tensor)

    history = kept_history(store, manifest["model_digest"])
    runs = {} if history is None else runs_of(history)

    def look(index: int) -> TaskRecord | str:
        name = plan.shards[index].name
        spent, run = runs.get(index, (None, None))
        if name not in files:
            return "the manifest does not know it"
        if not store.exists(name):
            return "it is missing"
        stat = store.stat(name)
        record = TaskRecord(
            index=index,
            shard=files[name],
            tensors=tuple(mine.get(name, ())),
            sample=sample_digest(
                lambda start, stop: store.read(name, start, stop), stat.size_bytes
            ),
            version=stat.version,
            spent=spent,
            run=run,
        )
        return _fault(store, plan, index, record, whole=whole) or record

    return _keep(plan, range(len(plan.shards)), look, whole=whole)


def lost_files(store: Store, manifest: Mapping[str, Any], *, whole: bool) -> list[str]:
    """Return what is missing of a finished output, or has another size, a line each.

    The model card may be another one: it is there to be edited.

    Parameters
    ----------
    store
        Of the output.
    manifest
        Its own.
    whole
        Whether the small files are read; `finished_tasks` reads the shards.
    """
    shards = {shard["name"] for shard in manifest["shards"]}

    def look(file: Mapping[str, Any]) -> str | None:
        name = file["name"]
        if not store.exists(name):
            return f"{name} is missing"
        size_bytes = store.stat(name).size_bytes
        if name == CARD_NAME:
            return None
        if size_bytes != file["size_bytes"]:
            return f"{name} has {size_bytes} bytes, not {file['size_bytes']}"
        if whole and name not in shards and file_sha256(store, name) != file["sha256"]:
            return f"{name} was changed"
        return None

    with ThreadPoolExecutor(DEFAULT_CONNECTIONS) as pool:  # remote objects take round trips
        found = pool.map(look, (*manifest["shards"], *manifest["files"]))
        return [line for line in found if line is not None]


def is_edited(store: Store, manifest: Mapping[str, Any]) -> bool:
    """Tell whether the model card is there, and another than the one that was written."""
    written = [f["sha256"] for f in manifest["files"] if f["name"] == CARD_NAME]
    return store.exists(CARD_NAME) and [file_sha256(store, CARD_NAME)] != written


def _keep(
    plan: MergePlan,
    indexes: Sequence[int],
    look: Callable[[int], TaskRecord | str],
    *,
    whole: bool,
) -> CommittedTasks:
    kept = CommittedTasks()
    with ThreadPoolExecutor(WHOLE_AT_ONCE if whole else DEFAULT_CONNECTIONS) as pool:
        for index, found in zip(indexes, pool.map(look, indexes), strict=True):
            if isinstance(found, TaskRecord):
                kept.add(found)
            else:
                log.info("%s is merged again: %s", plan.shards[index].name, found)
    return kept


def _fault(
    store: OutputStore, plan: MergePlan, index: int, record: TaskRecord, *, whole: bool
) -> str | None:
    """Return why a shard is not kept, or None."""
    shard = plan.shards[index]
    header, expected = _expected(plan, shard)
    size_bytes = expected[-1].stop if expected else len(header)
    said = (record.index, record.shard.name, record.shard.size_bytes)
    if said != (index, shard.name, size_bytes) or (
        [_facts(t) for t in record.tensors] != [_facts(t) for t in expected]
    ):
        return "its record is not of this merge"
    if not store.exists(shard.name):
        return "it is missing"
    stat = store.stat(shard.name)
    if stat.size_bytes != size_bytes:
        return f"it has {stat.size_bytes} bytes, not {size_bytes}"
    is_as_committed = store.is_remote and stat.version == record.version
    if is_as_committed and not whole:
        return None
    # A store that knows the digest answers for bytes that cannot be read, or need not.
    digest = store.known_sha256(shard.name)
    if digest is not None:
        return None if digest == record.shard.sha256 else "the store has not got its content"
    return _changed(store, record, header, whole=whole)


def _changed(store: Store, record: TaskRecord, header: bytes, *, whole: bool) -> str | None:
    """Return what of a shard's bytes is not as it was written, or None."""

    def read(start: int, stop: int) -> bytes:
        return store.read(record.shard.name, start, stop)

    if read(0, len(header)) != header:
        return "its header was changed"
    if sample_digest(read, record.shard.size_bytes) != record.sample or (
        whole and file_sha256(store, record.shard.name) != record.shard.sha256
    ):
        return "its content was changed"
    return None


def _expected(plan: MergePlan, shard: ShardLayout) -> tuple[bytes, list[TensorRecord]]:
    """Return the header of a shard, and what its record says of the tensors but for their data."""
    header, entries = build_header(*shard_entries(shard))
    return header, [
        TensorRecord(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            shard=shard.name,
            start=entry.start,
            stop=entry.stop,
            blake3="",
            action=plan.action(entry.name),
            stats=None,
        )
        for entry in entries
    ]


def _facts(tensor: TensorRecord) -> tuple[object, ...]:
    # Not the action: integers that turned out to differ were not copied as planned.
    return (
        *(tensor.name, tensor.dtype, tensor.shape, tensor.shard),
        *(tensor.start, tensor.stop),
    )


def _table(store: Store, manifest: Mapping[str, Any]) -> list[TensorRecord] | None:
    """Return the records of all tensors, None if they are not as they were written."""
    if not store.exists(TENSORS_NAME):
        return None
    data = store.read(TENSORS_NAME)
    found = file_record(TENSORS_NAME, data)
    if {"name": found.name, "size_bytes": found.size_bytes, "sha256": found.sha256} not in manifest[
        "files"
    ]:
        return None
    try:
        return load_tensors(data)
    except VerificationError:
        return None
