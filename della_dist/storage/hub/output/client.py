"""Requests to the Hub by whoever may write, made by `huggingface_hub`."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from della_dist.errors import DellaDistError, OutputError, RunError, StorageError, UnreachableError
from della_dist.locations import HUB_PREFIX
from della_dist.storage.hub.files import EXPIRED_STATUS, HubAnswerError, origin
from della_dist.storage.hub.output.operations import addition, is_ignored, is_uploaded
from della_dist.storage.hub.output.staging import UploadedShard
from della_dist.storage.hub.snapshot import HubFile, constants_of, reason_of
from della_dist.storage.remote.retry import error_status, retry
from della_dist.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")
log = logging.getLogger("della_dist.run")

_COMMIT = re.compile("[0-9a-f]{40}")
_REFUSED_STATUS = frozenset({401, 402, 403, 404})
#: What the Hub answers to a commit whose parent is not the head of the branch any more.
_CONFLICT_STATUS = frozenset({409, 412})
#: What it answers where the bytes that came are not those of the digest: damaged on the way.
_DAMAGED_STATUS = frozenset({400, 422})
_LOG_IN = "Log in with a token that may write ('hf auth login'), or set HF_TOKEN to one."


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
        if constants_of().HF_HUB_OFFLINE:
            raise OutputError(
                f"{self._location} cannot be written while HF_HUB_OFFLINE forbids to ask the Hub. "
                "Unset that, or choose a directory."
            )
        self._check_name()
        doing = f"looking up {self._location}"
        with self._refusing():
            user = None if self._is_allowed else self._ask(doing, lambda: _who(self._api))
            refs = self._ask(doing, self._refs)
            if refs is None:
                self._check_namespace(user)
                self._is_allowed = True
                return Head()
            if not self._is_allowed:
                self._ask(doing, self._check_right)
                self._is_allowed = True
        commits = {ref.name: ref.target_commit for ref in refs.branches}
        if self._branch not in commits and self._branch in {tag.name for tag in refs.tags}:
            raise OutputError(
                f"{self._location} names a tag, which nobody can write to. Name a branch behind "
                "the @, or leave it out for main."
            )
        commit = commits.get(self._branch) or self._ask(doing, self._first_commit)
        info = self._ask(
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
        with self._refusing():
            if head.commit is None:
                self._ask(
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
                self._ask(
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

        self._ask(doing, send, passing=_DAMAGED_STATUS)
        return operation.upload_info.sha256.hex() if is_uploaded(operation) else None

    def lost(self, shards: Sequence[UploadedShard]) -> list[str]:
        """Return the names of those whose bytes the store for large files has not."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        infos = [
            UploadInfo(size=s.size_bytes, sample=b"", sha256=bytes.fromhex(s.sha256))
            for s in shards
        ]
        actions, *_ = self._ask(
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
        self._ask(doing, lambda: self._send(additions))

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

        self._ask(doing, attempt, on_failure=made)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=constants_of().ENDPOINT, library_name="della-dist")

    def _ask(
        self,
        doing: str,
        call: Callable[[], T],
        on_failure: Callable[[Exception], T | None] | None = None,
        passing: Collection[int] = (),
    ) -> T:
        def attempt() -> T:
            try:
                return call()
            except DellaDistError:
                raise
            except Exception as error:
                plain = _plain(error)
            # Not from the error: its text may have a signed address.
            raise OSError(str(plain)) if error_status(plain) in passing else plain

        return retry(attempt, doing, on_failure=on_failure)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except UnreachableError:
            raise
        except StorageError as error:
            if error_status(error) not in _REFUSED_STATUS:
                raise
            raise OutputError(
                f"{self._location} cannot be written by this user ({error.__cause__}). {_LOG_IN}"
            ) from error

    def _check_name(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        if _COMMIT.fullmatch(self._branch) or self._branch.startswith("refs/"):
            raise OutputError(
                f"{self._location} names a commit or a reference, which nobody can write to. Name "
                "a branch behind the @, or leave it out for main."
            )
        try:
            validate_repo_id(self._repository)
        except HFValidationError as error:
            raise OutputError(f"{self._location} cannot be made on the Hub: {error}") from None

    def _refs(self) -> Any:  # noqa: ANN401
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self._api.list_repo_refs(self._repository)
        except RepositoryNotFoundError:
            return None

    def _first_commit(self) -> str:
        """Return what a new branch begins with: the repository before anything was put there."""
        return self._api.list_repo_commits(self._repository)[-1].commit_id

    def _check_namespace(self, user: Mapping[str, Any] | None) -> None:
        if user is None:
            return
        names = [user.get("name"), *(org.get("name") for org in user.get("orgs") or ())]
        if self._repository.partition("/")[0] not in names:
            raise OutputError(
                f"{self._location} does not exist, or is closed to this user ({names[0]}), who "
                f"may make repositories under {', '.join(map(str, names))}. Choose such a name, or "
                "log in as somebody else ('hf auth login', HF_TOKEN)."
            )

    def _check_right(self) -> None:
        check: Any = self._api.auth_check
        # Versions of huggingface_hub before 1.0 ask for the right to read alone.
        how = {"write": True} if "write" in inspect.signature(check).parameters else {}
        check(self._repository, **how)

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


def _who(api: HfApi) -> dict[str, Any]:
    """Return who the token belongs to."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        user = api.whoami()
    except LocalTokenNotFoundError:
        raise OutputError(
            f"writing to the Hub needs a token, and there is none. {_LOG_IN}"
        ) from None
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError(
            f"writing to the Hub needs a token that may write, and this one of {user.get('name')} "
            f"may only read. {_LOG_IN}"
        )
    return user


def _plain(error: Exception) -> Exception:
    """Return the failure of a request without the address, which may be signed, and the library."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if hasattr(response, "status_code"):
            where = origin(str(response.url))
            if where == origin(str(constants_of().ENDPOINT)):
                return HubAnswerError(response, reason_of(cause))
            if response.status_code in EXPIRED_STATUS:  # asked again, the Hub gives another one
                return OSError(f"{response.status_code}: an address of {where} was not valid")
            return HubAnswerError(response)
        last, cause = cause, cause.__cause__
    if isinstance(last, ValueError | TypeError | OSError):
        return last
    return OSError(f"{type(last).__name__}: {last}")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep to ourselves that a repository of a model gets a table, and what it says of the card."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit")
        warnings.filterwarnings("ignore", message="Warnings while validating metadata")
        yield
