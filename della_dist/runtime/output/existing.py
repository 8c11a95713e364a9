"""What lies in the output directory already, and what a run may make of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from della_dist.errors import InputError, OutputError, VerificationError, refused_as
from della_dist.locations import (
    HUB_PREFIX,
    check_location,
    hub_repository,
    is_url,
    local_path,
    overlap,
)
from della_dist.planning.build import MergePlan
from della_dist.planning.fingerprint import (
    copied_inputs,
    differences,
    identity,
    is_open,
    stage_differences,
)
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.foreign import foreign_companions, foreign_weights
from della_dist.runtime.output.records import (
    CARD_NAME,
    PLAN_KEY,
    STATE_KEYS,
    TASKS,
    FinishingRecord,
    load_run,
    run_record,
)
from della_dist.runtime.output.removal import complete_names, written
from della_dist.runtime.output.resume import (
    committed_tasks,
    finished_tasks,
    is_edited,
    lost_files,
)
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.storage.opening import open_output_store
from della_dist.storage.store import OutputStore
from della_dist.wording import few

log = logging.getLogger("della_dist.run")

_TO_WRITE = os.W_OK | os.X_OK


def open_output(
    location: str,
    plan: MergePlan,
    *,
    restart: bool,
    verify_resumed: bool = False,
    public: bool = False,
    staging: str | None = None,
) -> Output | dict[str, Any]:
    """Look at the output directory and decide what a run of `plan` may do there. Writes nothing.

    Returns the output to run, or the manifest if this very merge is already complete there.

    Parameters
    ----------
    location
        The output: a path or a URL.
    plan
        Of the run.
    restart
        Whether to discard what della_dist wrote there, and nothing else.
    verify_resumed
        Whether the shards of an earlier run are read whole.
    public, staging
        Of an output on the Hub; see `della_dist.storage.opening.open_output_store`.

    Raises
    ------
    OutputError
        If the output is an input or lies in one, belongs to another run (unless `restart`), has
        links where the run would write, or holds files of somebody else's whose names the run
        needs, or that would be loaded in place of the model.
    """
    try:
        check_location(location)
    except ValueError as error:
        raise OutputError(f"the output {error}.") from None
    if (public or staging is not None) and not location.startswith(HUB_PREFIX):
        raise OutputError(
            f"{'--public' if public else '--staging'} is for an output on the Hub, and {location} "
            "is none. Leave it out, or merge into hf://user/name."
        )
    refuse_overlap(location, plan)
    nearest = None if is_url(location) else _nearest_directory(local_path(location))
    what = f"the output {location}"
    try:
        with refused_as(OutputError, what):
            store = open_output_store(location, public=public, staging=staging)
            found = _look(store, plan, restart, verify_resumed)
    except InputError as error:  # no such kind of store
        raise OutputError(f"{what}: {error}") from error
    if nearest is not None and isinstance(found, Output) and not os.access(nearest, _TO_WRITE):
        raise OutputError(
            f"{location} cannot be written: {nearest} may not be changed by this user, or is on a "
            "disk that is read only. Choose another output, or mend its permissions."
        )
    return found


def refuse_overlap(location: str, plan: MergePlan) -> None:
    """Refuse an output that is an input of `plan`, or of which one lies in the other.

    Stages of the same run have folders of their own.

    Raises
    ------
    OutputError
        Naming both.
    """
    # What a model with adapters is made of is among the inputs itself.
    for checkpoint in (one for one in plan.inputs if one.shards):
        there = checkpoint.location
        is_on_hub = location.startswith(HUB_PREFIX) and there.startswith(HUB_PREFIX)
        is_same = is_on_hub and _repository(location) == _repository(there)
        if not checkpoint.is_stage and (is_same or overlap(location, there)):
            raise OutputError(
                f"the output {location} and the input {checkpoint.location} overlap. Write the "
                "output to a directory of its own."
            )


def _repository(location: str) -> str | None:
    found = hub_repository(location)
    return None if found is None else found[0].lower()


def _look(
    store: OutputStore, plan: MergePlan, restart: bool, verify_resumed: bool
) -> Output | dict[str, Any]:
    _refuse_links(store, (*STATE_KEYS, *store.list(f"{TASKS}/"), MANIFEST_NAME))
    if store.exists(MANIFEST_NAME):
        return _finished(store, plan, restart, verify_resumed)
    if store.exists(PLAN_KEY):
        return _unfinished(store, plan, restart, verify_resumed)
    _refuse_foreign(store, plan, ())  # new, or killed between taking the lease and the plan
    beside = foreign_companions(store, run_record(plan, {}).files)
    if beside:
        log.warning(
            "%s holds %s, which the merge does not write, and which may be loaded with its model.",
            store.location,
            few(beside),
        )
    return Output(store, plan)


def _finished(
    store: OutputStore, plan: MergePlan, restart: bool, verify_resumed: bool
) -> Output | dict[str, Any]:
    try:
        manifest = load_manifest(store.read(MANIFEST_NAME))
    except VerificationError as error:
        raise OutputError(
            f"{store.describe(MANIFEST_NAME)} is damaged, so that nobody can tell which files here "
            "are of which merge. Restore it from a copy, or choose another output."
        ) from error
    own = complete_names(manifest)
    if restart:
        _refuse_foreign(store, plan, own)
        return Output(store, plan, discard=own)
    recorded = {k: manifest.get(k) for k in identity(plan)}
    _refuse_other(store.location, recorded, plan, "holds", manifest.get("stages", ()))
    _refuse_foreign(store, plan, own)
    lost = lost_files(store, manifest, whole=verify_resumed)
    if not lost and not verify_resumed:
        return manifest
    committed = finished_tasks(store, plan, manifest, whole=verify_resumed)
    if not lost and len(committed) == len(plan.shards):
        return manifest
    why = (
        f": {few(lost, separator='; ')}" if lost else ""
    )  # a shard that was altered is named already
    log.info("%s was complete, and is completed again%s", store.location, why)
    kept = (CARD_NAME,) if is_edited(store, manifest) else ()
    reopened = FinishingRecord(run_record(plan, {}).files, kept)
    return Output(store, plan, committed, reopened=reopened)


def _unfinished(store: OutputStore, plan: MergePlan, restart: bool, verify_resumed: bool) -> Output:
    if restart:
        own = written(store)
        _refuse_foreign(store, plan, own)
        return Output(store, plan, discard=own)
    recorded = load_run(store)
    _refuse_other(store.location, recorded.identity, plan, "holds an unfinished run of")
    if recorded.discarding is not None:  # a --restart that was killed
        _refuse_foreign(store, plan, recorded.discarding)
        return Output(store, plan, discard=recorded.discarding)
    _refuse_foreign(store, plan, written(store))
    return Output(store, plan, committed_tasks(store, plan, whole=verify_resumed))


def _refuse_foreign(store: OutputStore, plan: MergePlan, own: Collection[str]) -> None:
    """Refuse links where the run writes or removes, and files of others in its way."""
    record = run_record(plan, {})
    names = (*record.shards, *record.files)
    _refuse_links(store, {*names, *own})
    taken = store.taken([name for name in names if name not in own])
    if taken:
        raise OutputError(
            f"{store.location} holds {few(taken)}, which this merge would overwrite and no merge "
            "wrote as far as its records say. Move what you need, remove the rest, or choose "
            "another output."
        )
    weights = foreign_weights(store, {*names, *own})
    if weights:
        raise OutputError(
            f"{store.location} holds {few(weights)}, which no merge wrote there and which would "
            "be loaded with the merged model, or in its place. Move that away, or choose another "
            "output."
        )


def _refuse_links(store: OutputStore, names: Iterable[str]) -> None:
    links = store.links(names)
    if links:
        raise OutputError(
            f"{store.location} has links where the merge writes ({few(links)}): what they point "
            "to would be changed. Remove them, or choose another output."
        )


def _refuse_other(
    location: str,
    recorded: Mapping[str, Any],
    plan: MergePlan,
    holds: str,
    stages: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    now = identity(plan)
    found = differences(recorded, now)
    if not found and stages is not None and is_open(now):
        found = stage_differences(stages, plan.stages)
    if found:
        shown = few(found, 4, separator="; ", longest=1000)
        raise OutputError(
            f"{location} {holds} another merge: {shown}. Choose another output, or discard this "
            "one with --restart."
        )
    copies = copied_inputs(recorded, now)
    if copies:
        log.warning(
            "%s: written at another time than what %s was begun with. The same size, header and "
            "samples: taken for copies. If weights were changed, start anew with --restart.",
            few(copies),
            location,
        )


def _nearest_directory(location: Path) -> Path:
    """Return the output's directory, or what it would be made in; refuse what cannot be one."""
    try:
        if location.is_file():
            raise OutputError(f"{location} is a file. The output must be a directory.")
        nearest = location
        while not _is_there(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            raise OutputError(
                f"{location} cannot be made: {nearest} is not a directory, or a link to nothing. "
                "Choose another output."
            )
    except OSError as error:  # a name that is too long, a folder that one may not look into
        raise OutputError(
            f"{location} cannot be an output: {error.strerror}. Choose another one."
        ) from error
    return nearest


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
