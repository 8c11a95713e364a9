"""Whole models of the Hub, put into its cache."""

from __future__ import annotations

from collections.abc import Sequence

from della_dist.locations import hub_repository
from della_dist.storage.hub.snapshot import constants_of, forget_snapshots, gated, reason_of
from della_dist.storage.remote.retry import retry


def download(location: str, ignored: Sequence[str]) -> None:
    """Put what the cache lacks of a commit there, and look anew at what it has.

    Where ``HF_HUB_OFFLINE`` is set the cache stays what it is.

    Parameters
    ----------
    location
        On the Hub, with the commit (`della_dist.storage.hub.snapshot.pinned`).
    ignored
        Patterns of files that stay where they are.

    Raises
    ------
    InputError
        If the repository is closed to this user.
    StorageError
        If the Hub does not answer, or the disk of the cache is full.
    """
    found = hub_repository(location)
    assert found is not None
    repository, commit = found
    if constants_of().HF_HUB_OFFLINE:
        return
    retry(lambda: _download(repository, commit, ignored), f"downloading {location}")
    forget_snapshots()


def _download(repository: str, commit: str | None, ignored: Sequence[str]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        snapshot_download(
            repository,
            revision=commit,
            ignore_patterns=list(ignored),
            library_name="della-dist",
            endpoint=constants_of().ENDPOINT,
        )
    except GatedRepoError as error:
        raise gated(repository, reason_of(error)) from error
