"""What a run writes down while it is unfinished, in ``.della/``, and how it is read again.

::

    .della/lock             held by the running driver, and by nobody once that is dead
    .della/plan.json        the identity of the run, and the names of all files it will write
    .della/tasks/00000.json a committed task: its shard's checksums, its tensors, how it was run
    .della/check.json       what a sample of the models said before the run began; for people alone
    .della/finishing.json   the names of the small files that are being written
    .della/events.log       what happened before the last run failed; for people alone
    .della/tmp/             files that are being written

Each document carries a digest of itself. A shard's name is the run's own from ``plan.json`` on,
that of a small file only once it is in ``finishing.json``, which is written after a look at what is
there: what a person puts beside a running merge stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from della_dist.errors import OutputError
from della_dist.planning.build import MergePlan
from della_dist.planning.layout import INDEX_NAME
from della_dist.runtime.companions.adapter_config import ADAPTER_CONFIG_NAME
from della_dist.runtime.task.kept_factors import FACTORS
from della_dist.runtime.task.merge import TaskRecord
from della_dist.storage.manifest import (
    MANIFEST_NAME,
    FileRecord,
    is_count,
    output_name,
    tensor_from_json,
    tensor_to_json,
)
from della_dist.storage.run_history import (
    RUN_NAME,
    spent_from_json,
    task_run_from_json,
    to_json,
)
from della_dist.storage.sealed import seal, unseal
from della_dist.storage.store import LOCK_KEY, STAGING_PREFIX, STATE_PREFIX, Store
from della_dist.storage.tensor_table import TENSORS_NAME

PLAN_KEY = f"{STATE_PREFIX}plan.json"
FINISHING_KEY = f"{STATE_PREFIX}finishing.json"
CHECK_KEY = f"{STATE_PREFIX}check.json"
EVENTS_KEY = f"{STATE_PREFIX}events.log"
TASKS = f"{STATE_PREFIX}tasks"
CARD_NAME = "README.md"

#: Keys of the state at which no link may be.
STATE_KEYS = (
    LOCK_KEY, PLAN_KEY, FINISHING_KEY, CHECK_KEY, EVENTS_KEY, TASKS, FACTORS,
    STAGING_PREFIX.rstrip("/"),
)  # fmt: skip


def task_key(index: int) -> str:
    """Return where the record of a task is."""
    return f"{TASKS}/{index:05d}.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """``plan.json``: what run this is, and which names are its own."""

    identity: dict[str, Any]
    shards: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Everything else that it will write, the manifest last."""
    discarding: tuple[str, ...] | None = None
    """While what an earlier run left is removed: its files. Nothing else was written yet."""


@dataclass(frozen=True, slots=True)
class FinishingRecord:
    """``finishing.json``: the small files that are the run's own from here on."""

    files: tuple[str, ...]
    kept: tuple[str, ...] = field(default=())
    """Those of an earlier time that a person has edited: they are left as they are."""


def run_record(plan: MergePlan, identity: dict[str, Any]) -> RunRecord:
    """Return the record of a run of `plan`."""
    shards = tuple(shard.name for shard in plan.shards)
    index = (INDEX_NAME,) if len(shards) > 1 else ()
    adapter = () if plan.adapter is None else (ADAPTER_CONFIG_NAME,)
    own = (TENSORS_NAME, CARD_NAME, RUN_NAME, MANIFEST_NAME)
    files = (*plan.companions, *index, *adapter, *own)
    return RunRecord(identity, shards, tuple(dict.fromkeys(files)))


def dump_run(record: RunRecord) -> bytes:
    """Return the bytes of ``plan.json``."""
    discarding = None if record.discarding is None else list(record.discarding)
    return seal(
        {
            "identity": record.identity,
            "shards": list(record.shards),
            "files": list(record.files),
            "discarding": discarding,
        }
    )


def load_run(store: Store) -> RunRecord:
    """Return ``plan.json`` of an unfinished run.

    Raises
    ------
    OutputError
        If it is damaged.
    """
    try:
        content = unseal(store.read(PLAN_KEY))
        discarding = content["discarding"]
        if type(content["identity"]) is not dict:
            raise ValueError("identity")  # noqa: TRY301
        return RunRecord(
            content["identity"],
            _names(content["shards"]),
            _names(content["files"]),
            None if discarding is None else _names(discarding),
        )
    except (ValueError, KeyError) as error:
        raise OutputError(
            f"{store.describe(PLAN_KEY)} is damaged, or of an earlier version, so that the run it "
            "belongs to cannot be continued. Discard what it left with --restart."
        ) from error


def dump_finishing(record: FinishingRecord) -> bytes:
    """Return the bytes of ``finishing.json``."""
    return seal({"files": list(record.files), "kept": list(record.kept)})


def load_finishing(store: Store) -> FinishingRecord | None:
    """Return ``finishing.json``; None if there is none, or a damaged one, which claims nothing."""
    if not store.exists(FINISHING_KEY):
        return None
    try:
        content = unseal(store.read(FINISHING_KEY))
        return FinishingRecord(_names(content["files"]), _names(content["kept"]))
    except (ValueError, KeyError):
        return None


def dump_task(record: TaskRecord) -> bytes:
    """Return the bytes of the record of a task."""
    return seal(
        {
            "index": record.index,
            "name": record.shard.name,
            "size_bytes": record.shard.size_bytes,
            "sha256": record.shard.sha256,
            "sample": record.sample,
            "version": record.version,
            "tensors": [tensor_to_json(t) for t in record.tensors],
            "spent": None if record.spent is None else to_json(record.spent),
            "run": None if record.run is None else to_json(record.run),
        }
    )


def load_task(data: bytes) -> TaskRecord:
    """Return the record that `dump_task` made.

    Raises
    ------
    ValueError
        If it made no such bytes.
    """
    content = unseal(data)
    try:
        texts = [content[key] for key in ("sha256", "sample", "version")]
        counts = [content[key] for key in ("index", "size_bytes")]
        if not all(type(text) is str for text in texts) or not all(map(is_count, counts)):
            raise ValueError("something in it is of another type")
        return TaskRecord(
            index=content["index"],
            shard=FileRecord(
                output_name(content["name"]), content["size_bytes"], content["sha256"]
            ),
            tensors=tuple(tensor_from_json(t) for t in content["tensors"]),
            sample=content["sample"],
            version=content["version"],
            spent=_if_known(spent_from_json, content.get("spent")),
            run=_if_known(task_run_from_json, content.get("run")),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it has no {error}") from error


T = TypeVar("T")


def _if_known(parsed: Callable[[Mapping[str, Any]], T], content: Any) -> T | None:  # noqa: ANN401
    """Return what nothing rests on, for which nothing is merged again; None if it is unreadable."""
    try:
        return None if content is None else parsed(content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _names(values: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Return names of files of an output, which were read from one of its records."""
    if type(values) is not list:
        raise ValueError("no list of names")
    return tuple(map(output_name, values))
