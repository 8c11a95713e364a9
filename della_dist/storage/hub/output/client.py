"""Requests to the Hub by whoever may write, made by `huggingface_hub`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from della_dist.errors import OutputError, RunError, StorageError
from della_dist.locations import HUB_PREFIX
from della_dist.storage.hub.output.access import check_name, check_namespace, check_right, who
from della_dist.storage.hub.output.operations import addition, is_ignored, is_uploaded
from della_dist.storage.hub.output.requests import ask, refusing
from della_dist.storage.hub.output.staging import UploadedShard
from della_dist.storage.hub.snapshot import PATIENCE_S, HubFile, constants_of
from della_dist.storage.remote.retry import error_status
from della_dist.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

log = logging.getLogger("della_dist.run")

#: What the Hub answers to a commit whose parent is not the head of the branch any more.
_CONFLICT_STATUS = frozenset({409, 412})
#: What it answers where the bytes that came are not those of the digest: damaged on the way.
_DAMAGED_STATUS = frozenset({400, 422})


@dataclass(frozen=True, slots=True)
class Head:
    """What a branch holds now, or would hold if it were made now."""

    commit: str | None = None
    """None where there is no repository."""
    files: Mapping[str, HubFile] = field(default_factory=dict)
    is_branch: bool = False
    is_private: bool = True


class HubClient:
    """Reads and writes one branch of one repository.

    Parameters
    ----------
    location
        Of the output, for messages.
    repository, branch
        What is written to.
    """

    def __init__(self, location: str, repository: str, branch: str) -> None:
        self._location = location
        self._repository = repository
        self._branch = branch
        self._is_allowed = False

    def head(self) -> Head:
        """Return what the branch holds, once it is certain that this user may write to it.

        Raises
        ------
        OutputError
            If it cannot be written to: no token, no right, no branch.
        UnreachableError
            If the Hub does not answer.
        """
        check_name(self._location, self._repository, self._branch)
        doing = f"looking up {self._location}"
        # Before there is anything to lose, nobody waits long for a Hub that is not there.
        asking = partial(ask, patience_s=None if self._is_allowed else PATIENCE_S)
        with refusing(self._location):
            user = None if self._is_allowed else asking(doing, lambda: who(self._api))
            refs = asking(doing, self._refs)
            if user is not None and refs is not None:
                about = (self._location, self._repository, user)
                asking(doing, lambda: check_right(self._api, *about))
            elif user is not None:
                check_namespace(self._location, self._repository, user)
            self._is_allowed = True
            if refs is None:
                return Head()
        commits = {ref.name: ref.target_commit for ref in refs.branches}
        if self._branch not in commits and self._branch in {tag.name for tag in refs.tags}:
            raise OutputError(
                f"{self._location} names a tag, which nobody can write to. Name a branch behind "
                "the @, or leave it out for main."
            )
        commit = commits.get(self._branch) or asking(doing, self._first_commit)
        info = asking(
            doing,
            lambda: self._api.model_info(self._repository, revision=commit, files_metadata=True),
        )
        files = {
            entry.rfilename: HubFile(
                entry.size or 0,
                (entry.blob_id or "") if entry.lfs is None else entry.lfs.sha256,
                None,
            )
            for entry in info.siblings or ()
        }
        return Head(commit, files, self._branch in commits, bool(info.private))

    def create(self, head: Head, *, public: bool) -> None:
        """Make repository and branch, where `head` lacks them; what is there stays as it is."""
        doing = f"making {self._location}"
        with refusing(self._location):
            if head.commit is None:
                ask(
                    doing,
                    lambda: self._api.create_repo(
                        self._repository, private=not public, exist_ok=True
                    ),
                )
                head = self.head()
            elif head.is_private == public:
                log.warning(
                    "%s%s exists and stays %s.",
                    HUB_PREFIX,
                    self._repository,
                    "private" if head.is_private else "public: everybody will see what is merged",
                )
            if not head.is_branch:
                ask(
                    doing,
                    lambda: self._api.create_branch(
                        self._repository,
                        branch=self._branch,
                        revision=head.commit,
                        exist_ok=True,
                    ),
                )

    def upload(self, name: str, path: Path, stopped: Callable[[], bool]) -> str | None:
        """Send a file ahead of the commit; return the SHA-256 of what was sent.

        Nothing is sent that the Hub's store has already. None if the Hub takes the file only with
        the commit, as it may do with small ones. `stopped` tells whether nobody wants it any more.
        """
        operation = addition(name, path)
        doing = f"uploading {self._location}/{name}"

        def send() -> None:
            if stopped():
                raise StorageError(f"{doing} was stopped.")
            self._send([operation])

        ask(doing, send, passing=_DAMAGED_STATUS)
        return operation.upload_info.sha256.hex() if is_uploaded(operation) else None

    def lost(self, shards: Sequence[UploadedShard]) -> list[str]:
        """Return the names of those whose bytes the store for large files has not."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        infos = [
            UploadInfo(size=s.size_bytes, sample=b"", sha256=bytes.fromhex(s.sha256))
            for s in shards
        ]
        actions, *_ = ask(
            f"looking up {self._location}",
            lambda: post_lfs_batch_info(
                infos,
                token=None,
                repo_type="model",
                repo_id=self._repository,
                revision=self._branch,
                endpoint=constants_of().ENDPOINT,
            ),
        )
        there = {found["oid"] for found in actions if not found.get("actions")}
        return [shard.name for shard in shards if shard.sha256 not in there]

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        deleted: Sequence[str],
        parent: str | None,
        is_made: Callable[[], bool],
    ) -> None:
        """Make everything visible at once, as the successor of `parent`.

        Parameters
        ----------
        additions, deleted
            The files.
        parent
            What the branch held when the run looked at it.
        is_made
            Tells whether the branch has the commit: an answer may be lost.

        Raises
        ------
        RunError
            If the branch holds something else than `parent` by now.
        StorageError
            If the Hub does not take it.
        """
        from huggingface_hub import CommitOperationDelete

        doing = f"committing to {self._location}"
        ask(doing, lambda: self._send(additions))

        def attempt() -> bool:
            with _without_warnings():
                self._api.create_commit(
                    self._repository,
                    [*additions, *map(CommitOperationDelete, deleted)],
                    commit_message=f"Merge (della_dist {__version__})",
                    revision=self._branch,
                    parent_commit=parent,
                )
            return True

        def made(error: Exception) -> bool | None:
            if is_made():
                return True
            if error_status(error) in _CONFLICT_STATUS and self.head().commit != parent:
                raise RunError(
                    f"{self._location} was changed while the merge was running: somebody else "
                    "committed to it. Nothing of this run is visible there, and nothing is lost: "
                    "run the same command again, which looks at what is there and then commits."
                )
            return None

        ask(doing, attempt, on_failure=made)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=constants_of().ENDPOINT, library_name="della-dist")

    def _refs(self) -> Any:  # noqa: ANN401
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self._api.list_repo_refs(self._repository)
        except RepositoryNotFoundError:
            return None

    def _first_commit(self) -> str:
        """Return what a new branch begins with: the repository before anything was put there."""
        return self._api.list_repo_commits(self._repository)[-1].commit_id

    def _send(self, additions: Sequence[CommitOperationAdd]) -> None:
        self._api.preupload_lfs_files(
            self._repository, additions, revision=self._branch, free_memory=False
        )
        ignored = [operation.path_in_repo for operation in additions if is_ignored(operation)]
        if ignored:
            raise StorageError(
                f"{self._location} has a .gitignore that leaves out {', '.join(ignored[:3])}. "
                "Remove it from the repository, then run the same command again."
            )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep to ourselves that a repository of a model gets a table, and what it says of the card."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit")
        warnings.filterwarnings("ignore", message="Warnings while validating metadata")
        yield
