"""How an output came about: kept beside it for people. No merge fails, or waits, for want of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from della_dist.errors import InputError, StorageError
from della_dist.runtime.output.committed import CommittedTasks
from della_dist.runtime.output.records import CHECK_KEY
from della_dist.specs.history import History, Session
from della_dist.storage.run_history import RUN_NAME, dump_history, gathered, load_history
from della_dist.storage.sealed import seal, unseal
from della_dist.storage.store import OutputStore, Store

log = logging.getLogger("della_dist.run")


def keep_check(store: OutputStore, check: Mapping[str, Any] | None) -> None:
    """Keep what was found of the models before a merge, until it is complete; None: nothing was."""
    if check is not None:
        _put(store, CHECK_KEY, seal({"check": dict(check)}))


def keep_history(
    store: OutputStore, digest: str, committed: CommittedTasks, last: Session | None
) -> None:
    """Write ``della_run.json``.

    Parameters
    ----------
    store
        Of the output.
    digest
        The model digest.
    committed
        All its tasks.
    last
        The session that completes the output.
    """
    history = gathered(digest, committed.runs(), last, _kept_check(store))
    _put(store, RUN_NAME, dump_history(history))


def kept_history(store: Store, digest: str) -> History | None:
    """Return how the output with this model digest came about.

    None if that is not known: it was not recorded, or what was is damaged, or of another output.
    """
    if not store.exists(RUN_NAME):
        return None
    try:
        store.check(RUN_NAME)
        found = load_history(store.read(RUN_NAME))
    except (ValueError, InputError, StorageError):
        return None
    return found if found.model_digest == digest else None


def _kept_check(store: Store) -> Mapping[str, Any] | None:
    try:
        found = unseal(store.read(CHECK_KEY)).get("check") if store.exists(CHECK_KEY) else None
    except (ValueError, StorageError):
        return None
    return found if isinstance(found, dict) else None


def _put(store: OutputStore, key: str, data: bytes) -> None:
    try:
        store.put(key, data)
    except StorageError as error:
        log.info("how the merge was run is not recorded: %s", error)
