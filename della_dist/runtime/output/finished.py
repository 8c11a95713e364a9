"""Open an output that is finished."""

from __future__ import annotations

from typing import Any

from della_dist.errors import OutputError
from della_dist.locations import HUB_PREFIX, hub_repository, is_url, local_path
from della_dist.storage.manifest import MANIFEST_NAME, load_manifest
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store


def open_finished(out: str) -> tuple[Store, dict[str, Any]]:
    """Return the store of an output, and its manifest.

    Raises
    ------
    OutputError
        If `out` holds no finished output.
    VerificationError
        If its manifest is damaged.
    """
    store = open_store(out)
    if not store.exists(MANIFEST_NAME):
        raise OutputError(
            f"{out} holds no finished output of della-dist ({MANIFEST_NAME} is missing). "
            "If a merge into it was interrupted, run that merge again first."
            f"{_on_the_hub(out)}"
        )
    return store, load_manifest(store.read(MANIFEST_NAME))


def _on_the_hub(out: str) -> str:
    """Return what to say of a path that is not there, and could be the name of a repository."""
    if is_url(out) or hub_repository(out) is None or local_path(out).exists():
        return ""
    return f" If the repository on the Hub is meant, write {HUB_PREFIX}{out}."
