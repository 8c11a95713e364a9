"""What a repository of the Hugging Face Hub holds at one commit, and what of it is in the cache.

Endpoint, token, cache and offline mode are those of `huggingface_hub`, with its environment
variables (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della_dist.errors import InputError, UnreachableError
from della_dist.locations import HUB_PREFIX, hub_repository
from della_dist.storage.remote.retry import retry
from della_dist.wording import few

log = logging.getLogger("della_dist.run")

_COMMIT = re.compile("[0-9a-f]{40}")
DEFAULT_REVISION = "main"
_ANSWER_S = 15.0
#: How long the Hub is asked again what a name is, which may be that of a directory, misspelled.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit."""

    size_bytes: int
    version: str
    """Its ETag: the SHA-256 of a large file, the id of a small one in git."""
    path: Path | None
    """Where the cache has it."""


def pinned(location: str) -> str:
    """Return a location on the Hub with the commit in place of a branch, a tag or nothing.

    Raises
    ------
    InputError
        If there is no such repository or revision, or it is closed to this user.
    UnreachableError
        If the Hub does not answer, and the cache does not know the revision.
    """
    found = hub_repository(location)
    assert found is not None
    repository, revision = found[0], found[1] or DEFAULT_REVISION
    if _COMMIT.fullmatch(revision):
        snapshot(repository, revision)  # that there is none is said now, beside others
    else:
        revision, files = _look(repository, revision)
        with _snapshots_lock:
            _snapshots[_key(repository, revision)] = files
    return f"{HUB_PREFIX}{repository}@{revision}"


_snapshots: dict[tuple[str, ...], Mapping[str, HubFile]] = {}
_snapshots_lock = threading.Lock()


def snapshot(repository: str, commit: str) -> Mapping[str, HubFile]:
    """Return the files of a commit by name; asked for once in a process.

    Without the Hub they are those that the cache has, which may not be all.

    Raises
    ------
    InputError, UnreachableError
        As `pinned`.
    """
    key = _key(repository, commit)
    with _snapshots_lock:
        if key not in _snapshots:
            _snapshots[key] = _look(repository, commit)[1]
        return _snapshots[key]


def forget_snapshots() -> None:
    """Look anew at what the Hub and the cache have: after a download."""
    with _snapshots_lock:
        _snapshots.clear()


def _key(repository: str, commit: str) -> tuple[str, ...]:
    constants = constants_of()
    return str(constants.ENDPOINT), str(constants.HF_HUB_CACHE), repository, commit


def _look(repository: str, revision: str) -> tuple[str, Mapping[str, HubFile]]:
    """Return commit and files of a revision, as the Hub has them or else the cache."""
    constants = constants_of()
    commit = _cached_commit(repository, revision)
    cached = {} if commit is None else _cached_files(repository, commit)
    if constants.HF_HUB_OFFLINE and not cached:
        has = _cached_revisions(repository)
        what = f"is not in the cache ({constants.HF_HUB_CACHE})"
        if has:
            what = f"is in the cache, but not its revision {revision} (there: {few(has)})"
        raise InputError(
            f"{HUB_PREFIX}{repository} {what}, and HF_HUB_OFFLINE forbids to ask the Hub. Download "
            "it where there is a network ('hf download'), or unset that."
        )
    if commit is not None and constants.HF_HUB_OFFLINE:
        return commit, cached
    doing = f"looking up {HUB_PREFIX}{repository}@{revision}"
    try:
        # Where the cache knows, nobody waits for a Hub that is not there.
        info = retry(
            lambda: _model_info(repository, revision, doing),
            doing,
            patience_s=0.0 if cached else PATIENCE_S,
        )
    except UnreachableError as error:
        if commit is None or not cached:
            raise
        why = f"{doing} failed: {error.__cause__}"
        log.warning("Going by what the cache has, since the Hub does not answer (%s).", why)
        return commit, cached
    if info.sha != commit:
        cached = _cached_files(repository, info.sha)
    return info.sha, {entry.rfilename: _hub_file(entry, cached) for entry in info.siblings}


def _hub_file(entry: Any, cached: Mapping[str, HubFile]) -> HubFile:  # noqa: ANN401
    version = entry.blob_id if entry.lfs is None else entry.lfs.sha256
    here = cached.get(entry.rfilename)
    if here is not None and (here.size_bytes, here.version) == (entry.size, version):
        return here
    return HubFile(entry.size, version, None)


def _model_info(repository: str, revision: str, doing: str) -> Any:  # noqa: ANN401
    """Return what the Hub says of a revision, in one attempt."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = constants_of().ENDPOINT
    api = HfApi(endpoint=endpoint, library_name="della-dist")
    try:
        return api.model_info(repository, revision=revision, files_metadata=True, timeout=_ANSWER_S)
    except GatedRepoError as error:
        raise gated(repository, reason_of(error)) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{doing} failed: there is no such revision. Check the name behind the @: a branch, a "
            f"tag or a commit of {endpoint}/{repository}."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{HUB_PREFIX}{repository} does not exist on the Hub, or is private. Check the name; "
            "for a private model log in ('hf auth login') or set HF_TOKEN."
        ) from error


def gated(repository: str, reason: str) -> InputError:
    """Return the error for a repository whose files only some users may read."""
    return InputError(
        f"{HUB_PREFIX}{repository} is gated, and this user has no access to it ({reason}). Ask for "
        f"access at {constants_of().ENDPOINT}/{repository}, then log in ('hf auth login') or set "
        "HF_TOKEN."
    )


def reason_of(error: BaseException) -> str:
    """Return the first line of what the Hub says."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(str(said).split())[:300].rstrip(".")


def cached_folder(repository: str, commit: str) -> Path:
    """Return where the cache has the files of a commit, whether it has any or not."""
    return _cache(repository) / "snapshots" / commit


def _cached_commit(repository: str, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (_cache(repository) / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _cached_revisions(repository: str) -> list[str]:
    """Return the branches and tags that the cache knows, and the commits that have no name."""
    root = _cache(repository)
    refs = root / "refs"
    names = [p.relative_to(refs).as_posix() for p in sorted(refs.rglob("*")) if p.is_file()]
    commit_of = {name: _cached_commit(repository, name) for name in names}
    folders = [path.name for path in sorted(root.glob("snapshots/*"))]
    commits = [commit for commit in folders if _cached_files(repository, commit)]
    return [
        *(name for name, commit in commit_of.items() if commit in commits),
        *(commit for commit in commits if commit not in commit_of.values()),
    ]


def _cached_files(repository: str, commit: str) -> dict[str, HubFile]:
    root = cached_folder(repository, commit)
    files = {}
    for path in root.rglob("*"):
        if path.is_file():
            # A name in the cache is a link to the blob, whose name is the ETag.
            version = path.readlink().name if path.is_symlink() else ""
            files[path.relative_to(root).as_posix()] = HubFile(path.stat().st_size, version, path)
    return files


def _cache(repository: str) -> Path:
    return Path(constants_of().HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def constants_of() -> Any:  # noqa: ANN401
    """Return the settings of `huggingface_hub`, as its environment variables say."""
    from huggingface_hub import constants

    return constants
