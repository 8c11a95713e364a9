"""An output on the Hub: seen as what its branch holds, with what this run changes laid over it.

Shards are written to a folder here, sent ahead as they are committed, and removed. The manifest
makes the one commit that shows everything. `della_dist.storage.hub.output.staging` has the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from della_dist.errors import OutputError, RunError, StorageError, UnreachableError
from della_dist.storage.hub.output.lease import HubLease
from della_dist.storage.hub.output.operations import addition, uploaded_addition
from della_dist.storage.hub.output.staging import PlannedCommit, UploadedShard
from della_dist.storage.hub.output.uploads import Uploads
from della_dist.storage.hub.output.view import HubView
from della_dist.storage.hub.snapshot import HubFile
from della_dist.storage.remote.retry import retry
from della_dist.storage.store import STATE_PREFIX, ObjectStat, Writer
from della_dist.wording import few

log = logging.getLogger("della_dist.run")


class HubStore(HubView):
    """One branch of a repository; see `della_dist.storage.store.OutputStore`.

    Parameters
    ----------
    location
        ``hf://user/name`` or ``hf://user/name@branch``.
    connections
        Requests at once, to read what is there.
    public
        Whether everybody may see a repository that this makes.
    staging
        Folder in which the run's own one is; None: beside the Hub's cache.
    """

    def __init__(
        self, location: str, connections: int, *, public: bool = False, staging: str | None = None
    ) -> None:
        super().__init__(location, connections, staging)
        self._public = public
        self._uploads: Uploads[UploadedShard] | None = None
        self._sending: set[UploadedShard] = set()
        """What was given to them, and may still be on its way."""

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once: it waits here for the commit."""
        return self._local.put(key, data)

    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object, which waits here for the commit."""
        return self._local.create(key, size_bytes)

    def delete(self, key: str) -> None:
        """Remove `key` from what waits here, and from the branch with the commit."""
        self._local.delete(key)
        if not key.startswith(STATE_PREFIX):
            self._staging.forget_upload(key)
            if key in self._head.files:
                self._staging.delete(key)

    def settle(self, key: str, committed: ObjectStat, sha256: str) -> None:
        """Send a shard to the Hub, unless it has it, and remove it here."""
        shard = UploadedShard(key, committed.size_bytes, sha256, committed.version)
        sent = self._staging.uploaded(key)
        if sent is not None and sent.sha256 == sha256 and key not in self._lost:
            self._local.delete(key)  # what a worker that was believed dead has written once more
        elif self._local.exists(key) and shard not in self._sending:
            assert self._uploads is not None
            self._sending.add(shard)
            self._uploads.add(shard)

    def _send(self, shard: UploadedShard) -> Callable[[], None]:
        uploads = self._uploads
        assert uploads is not None
        path = self._local.path(shard.name)
        sha256 = self._client.upload(shard.name, path, lambda: uploads.is_closed)
        if sha256 is None:  # it goes with the commit
            return lambda: None
        if sha256 != shard.sha256:
            raise StorageError(
                f"{path} is not what was written there. Check the disk, "
                "then run the same command again with --verify-resumed."
            )
        return lambda: self._staging.note_upload(shard)

    def complete(self, key: str, data: bytes) -> ObjectStat:
        """Wait for what is being sent, and make the commit that shows everything."""
        try:
            return self._complete(key, data)
        except OutputError as error:  # too late to refuse: what is merged and sent is kept
            raise RunError(str(error)) from error

    def _complete(self, key: str, data: bytes) -> ObjectStat:
        assert self._uploads is not None
        self._uploads.finish()
        parent = self._head
        deleted = [name for name in self._staging.deleted() if name in parent.files]
        planned = self._staging.plan_commit(key, data, deleted)
        sent = {shard.name: shard for shard in self._staging.all_uploaded()}
        additions = [uploaded_addition(s.name, s.size_bytes, s.sha256) for s in sent.values()]
        waiting = (name for name in self._staging.files() if name not in sent)
        additions.extend(addition(name, self._local.path(name)) for name in waiting)
        additions.append(addition(key, data))
        try:
            self._client.commit(
                additions,
                planned.deleted,
                parent.commit,
                lambda: planned.is_in(self._client.head().files),
            )
        except UnreachableError:
            raise
        except StorageError as error:
            lost = self._client.lost(list(sent.values())) if sent else []
            if not lost:
                raise
            raise StorageError(
                f"committing to {self.location} failed: the Hub has lost {few(lost)}, which was "
                "sent to it by an earlier run. Run the same command again with --verify-resumed: "
                "only that is merged and sent anew."
            ) from error
        retry(lambda: self._look_for(planned), f"committing to {self.location}")
        self._staging.clear()
        self._planned = None
        log.info("%s has everything in commit %s", self.location, self._head.commit)
        return self.stat(key)

    def _look_for(self, planned: PlannedCommit) -> None:
        """Look whether everything is there: what the Hub leaves out without a word is no output."""
        self._seen = None
        missing = planned.missing(self._head.files)
        if missing:  # its servers may not all have heard of the commit
            raise OSError(f"the branch has not got {few(missing)}")

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind."""
        self._local.clear_staging()

    def delete_state(self) -> None:
        """Remove the records of a run, and the folder if nothing else is in it."""
        if self._uploads is not None:
            self._uploads.close()
        if self._is_void:
            self._staging.clear()
        self._local.delete_state()

    def has_state(self) -> bool:
        """Return whether a run has left anything but output."""
        return self._local.has_state()

    def remember_root(self) -> Callable[[], None]:
        """Return a function that removes the folder, if it is not there at this moment."""
        return self._local.remember_root()

    def free_bytes(self) -> None:
        """Return None: a few shards are here at a time, and room for each is reserved."""
        return

    def lock(self, owner_text: str, *, lease: bool = True) -> HubLease:
        """Take the lock of the folder, and make the repository and the branch if need be.

        Of two machines that write to one branch the later one is refused its commit.
        """
        before, files = self._head, self._files
        held = self._local.lock(owner_text)
        try:
            self._client.create(before, public=self._public)
            self._seen = None
            self._refuse_other(files)
            if self._is_void:
                self._staging.clear()
                self._planned = None
        except BaseException:
            held.release()
            raise
        self._uploads = Uploads(self._send)
        self._sending.clear()
        return HubLease(held, self._uploads)

    def _refuse_other(self, files: Mapping[str, HubFile]) -> None:
        if self._files != files:
            raise OutputError(
                f"{self.location} was written by somebody else just now. Run the same command "
                "again to see where it stands."
            )

    def is_held(self, token: str) -> bool:
        """Return whether the lock with this token is the one in force."""
        return self._local.is_held(token)
