"""What lies in the output directory already, and what a run may make of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from della_dist.errors import OutputError, VerificationError
from della_dist.plan.build import MergePlan
from della_dist.plan.fingerprint import explain_difference, identity
from della_dist.plan.layout import INDEX_NAME, is_shard_name
from della_dist.runtime.companions import is_companion
from della_dist.runtime.output import PLAN_KEY, RECORDS, Output, committed_tasks, read_record
from della_dist.storage.local import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME, TENSORS_NAME, load_manifest


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
        return Output(store, plan)
    if store.exists(MANIFEST_NAME):
        return _finished(store, plan, restart=restart)
    if store.exists(PLAN_KEY):
        return _unfinished(store, plan, restart=restart)
    if [p.name for p in location.iterdir()] == [RECORDS]:
        return Output(store, plan)  # killed between taking the lock and recording the plan
    raise OutputError(
        f"{location} is not empty and was not written by della-dist. Choose a new directory, "
        "or empty this one."
    )


def _finished(store: LocalStore, plan: MergePlan, *, restart: bool) -> Output | dict[str, Any]:
    try:
        manifest = load_manifest(store.read(MANIFEST_NAME))
    except VerificationError as error:
        raise OutputError(f"{store.path(MANIFEST_NAME)}: {error}") from error
    if restart:
        names = [f["name"] for f in (*manifest["shards"], *manifest["files"])]
        return Output(store, plan, discard=names)
    _refuse_other(store.root, {k: manifest.get(k) for k in identity(plan)}, plan, "holds")
    return manifest


def _unfinished(store: LocalStore, plan: MergePlan, *, restart: bool) -> Output:
    if restart:
        # Whatever such a file is: the directory was empty before the run.
        return Output(store, plan, discard=[n for n in store.list() if _is_ours(n)])
    recorded = read_record(store, PLAN_KEY)
    _refuse_other(store.root, recorded.get("identity", {}), plan, "holds an unfinished run of")
    if "discarding" in recorded:  # a --restart that was killed
        return Output(store, plan, discard=[n for n in recorded["discarding"] if _is_ours(n)])
    return Output(store, plan, committed_tasks(store, plan))


def _refuse_other(location: Path, recorded: Mapping[str, Any], plan: MergePlan, holds: str) -> None:
    differences = explain_difference(dict(recorded), identity(plan))
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise OutputError(
            f"{location} {holds} another merge: {shown}. Choose another output, or discard this "
            "one with --restart."
        )


def _is_ours(name: str) -> bool:
    """Tell whether an unfinished run may have written a file of this name."""
    fixed = (INDEX_NAME, TENSORS_NAME, "README.md")
    return name in fixed or is_shard_name(name) or is_companion(name)


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
