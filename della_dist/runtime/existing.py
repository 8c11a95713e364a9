"""What lies in the output directory already, and what a run may make of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from della_dist.errors import InputError, OutputError, VerificationError, refused_as
from della_dist.locations import check_location, is_url, local_path, overlap
from della_dist.plan.build import MergePlan
from della_dist.plan.fingerprint import explain_difference, identity
from della_dist.plan.layout import INDEX_NAME, is_shard_name
from della_dist.runtime.companions import is_companion
from della_dist.runtime.output import PLAN_KEY, Output, committed_tasks, read_record
from della_dist.storage.manifest import MANIFEST_NAME, TENSORS_NAME, load_manifest
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store


def open_output(location: str, plan: MergePlan, *, restart: bool) -> Output | dict[str, Any]:
    """Look at the output directory and decide what a run of `plan` may do there. Writes nothing.

    Returns the output to run, or the manifest if this very merge is already complete there.

    Raises
    ------
    OutputError
        If the output is an input or lies in one, holds something else, or belongs to another run
        (unless `restart`, which discards what della_dist wrote there and nothing else).
    """
    try:
        check_location(location)
    except ValueError as error:
        raise OutputError(f"the output {error}.") from None
    for checkpoint in plan.inputs:
        if overlap(location, checkpoint.location):
            raise OutputError(
                f"the output {location} and the input {checkpoint.location} overlap. Write the "
                "output to a directory of its own."
            )
    if not is_url(location):
        _refuse_no_directory(local_path(location))
    what = f"the output {location}"
    try:
        with refused_as(OutputError, what):
            return _look(open_store(location), plan, restart=restart)
    except InputError as error:  # no such kind of store
        raise OutputError(f"{what}: {error}") from error


def _look(store: Store, plan: MergePlan, *, restart: bool) -> Output | dict[str, Any]:
    if store.exists(MANIFEST_NAME):
        return _finished(store, plan, restart=restart)
    if store.exists(PLAN_KEY):
        return _unfinished(store, plan, restart=restart)
    if store.holds_only_state():  # or killed between taking the lease and recording the plan
        return Output(store, plan)
    raise OutputError(
        f"{store.location} is not empty and was not written by della-dist. Choose a new directory, "
        "or empty this one."
    )


def _finished(store: Store, plan: MergePlan, *, restart: bool) -> Output | dict[str, Any]:
    try:
        manifest = load_manifest(store.read(MANIFEST_NAME))
    except VerificationError as error:
        raise OutputError(f"{store.describe(MANIFEST_NAME)}: {error}") from error
    if restart:
        names = [f["name"] for f in (*manifest["shards"], *manifest["files"])]
        return Output(store, plan, discard=names)
    _refuse_other(store.location, {k: manifest.get(k) for k in identity(plan)}, plan, "holds")
    return manifest


def _unfinished(store: Store, plan: MergePlan, *, restart: bool) -> Output:
    if restart:
        # Whatever such a file is: the directory was empty before the run.
        return Output(store, plan, discard=[n for n in store.list() if _is_ours(n)])
    recorded = read_record(store, PLAN_KEY)
    _refuse_other(store.location, recorded.get("identity", {}), plan, "holds an unfinished run of")
    if "discarding" in recorded:  # a --restart that was killed
        return Output(store, plan, discard=[n for n in recorded["discarding"] if _is_ours(n)])
    return Output(store, plan, committed_tasks(store, plan))


def _refuse_other(location: str, recorded: Mapping[str, Any], plan: MergePlan, holds: str) -> None:
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
