"""Removing what a run has written, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from della_dist.errors import OutputError
from della_dist.planning.build import MergePlan
from della_dist.planning.fingerprint import identity
from della_dist.runtime.output.records import (
    PLAN_KEY,
    RunRecord,
    dump_run,
    load_finishing,
    load_run,
)
from della_dist.runtime.output.resume import recorded_shards
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.store import OutputStore


def owner() -> str:
    """Return who takes a lock, for those who are refused."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def complete_names(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of a complete output."""
    listed = (f["name"] for f in (*manifest["shards"], *manifest["files"]))
    return [*listed, RUN_NAME, MANIFEST_NAME]


def written(store: OutputStore) -> list[str]:
    """Return the names of the output's files that the unfinished run in `store` made its own."""
    try:
        recorded = load_run(store)
    except OutputError:  # the other records say at least what was committed
        recorded = RunRecord({}, shards=tuple(recorded_shards(store)))
    finishing = load_finishing(store)
    files = () if finishing is None else finishing.files
    return [*recorded.shards, *files, *(recorded.discarding or ())]


def discard(store: OutputStore, names: Sequence[str], recorded: dict[str, Any]) -> None:
    """Remove files of an output, under its lock, after a note of which they are.

    Killed on the way, the next run goes on discarding. The manifest is first: from there on the
    output is visibly unfinished.

    Parameters
    ----------
    store
        Of the output.
    names
        Of the files.
    recorded
        The identity of the run that may go on.
    """
    note = RunRecord(recorded, discarding=tuple(names))
    store.put(PLAN_KEY, dump_run(note))
    for name in (MANIFEST_NAME, *names):
        store.delete(name)


def remove(store: OutputStore, plan: MergePlan, *, lease: bool = True) -> None:
    """Remove a whole output, complete or not; files of others in its folder stay.

    Parameters
    ----------
    store
        Of the output.
    plan
        Of the run that it is of.
    lease
        See `Store.lock`.
    """
    if not store.exists(MANIFEST_NAME) and not store.has_state():
        return
    with store.lock(owner(), lease=lease):
        if store.exists(MANIFEST_NAME):
            discard(store, complete_names(load_manifest(store.read(MANIFEST_NAME))), identity(plan))
        elif store.exists(PLAN_KEY):
            discard(store, written(store), identity(plan))
        store.clear_staging(plan.companions)
        store.delete_state()


def tidy(store: OutputStore, *, lease: bool = True) -> None:
    """Remove the records that a run left behind which was killed right after the manifest."""
    if store.has_state():
        with store.lock(owner(), lease=lease):
            store.delete_state()
