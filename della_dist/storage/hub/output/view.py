"""What a run sees of a branch of the Hub that it writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from della_dist.errors import MissingObjectError, StorageError
from della_dist.locations import HUB_PREFIX, hub_repository
from della_dist.specs.checkpoint import ShardFile
from della_dist.storage.hub.files import HubFiles
from della_dist.storage.hub.output.client import Head, HubClient
from della_dist.storage.hub.output.staging import (
    PlannedCommit,
    Staging,
    UploadedShard,
    staging_folder,
)
from della_dist.storage.hub.snapshot import DEFAULT_REVISION, HubFile
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.readahead import ReadAhead
from della_dist.storage.store import STATE_PREFIX, ObjectStat, Reader, check_key

#: What the Hub itself puts into a new repository. A model card is replaced by the run's own.
_OF_NEW_REPOSITORIES = frozenset({".gitattributes", "README.md"})


class HubView:
    """What a branch holds, with what waits here laid over it; see `della_dist.storage.store.Store`.

    Parameters
    ----------
    location
        ``hf://user/name`` or ``hf://user/name@branch``.
    connections
        Requests at once, to read what is there.
    staging
        Folder in which the run's own one is; None: beside the Hub's cache.
    """

    is_remote = True

    def __init__(self, location: str, connections: int, staging: str | None) -> None:
        found = hub_repository(location)
        assert found is not None
        self.location = location.rstrip("/")
        self._repository, self._branch = found[0], found[1] or DEFAULT_REVISION
        self._connections = connections
        self._local = LocalStore(staging_folder(self._repository, self._branch, staging))
        self._staging = Staging(self._local)
        self._client = HubClient(self.location, self._repository, self._branch)
        self._seen: Head | None = None
        self._planned: PlannedCommit | None = None
        self._lost: set[str] = set()
        """Shards that were sent, and that the Hub has not any more."""

    @property
    def _head(self) -> Head:
        if self._seen is None:
            self._seen = self._client.head()
            self._planned = self._staging.planned_commit()
        return self._seen

    @property
    def _is_void(self) -> bool:
        """Whether nothing counts that lies here: the branch has a complete output.

        A run was killed right after its commit, or another machine has completed the output.
        """
        files = self._head.files
        if self._planned is not None and self._planned.is_in(files):
            return True
        return MANIFEST_NAME in files and MANIFEST_NAME not in self._staging.deleted()

    @property
    def _files(self) -> Mapping[str, HubFile]:
        """What of the branch counts."""
        files = {k: f for k, f in self._head.files.items() if not k.startswith(STATE_PREFIX)}
        if files.keys() <= _OF_NEW_REPOSITORIES:
            return {}
        deleted = () if self._is_void else self._staging.deleted()
        return {key: file for key, file in files.items() if key not in deleted}

    def _waits(self, key: str) -> bool:
        """Return whether `key` lies in the folder here, and counts."""
        if not self._local.exists(key):
            return False
        return key.startswith(STATE_PREFIX) or not self._is_void

    def _sent(self, key: str) -> UploadedShard | None:
        if key.startswith(STATE_PREFIX):
            return None
        record = self._staging.uploaded(key)
        return None if record is None or self._is_void else record

    @property
    def shards_location(self) -> str:
        """The folder from which the driver uploads."""
        return str(self._local.root)

    def describe(self, key: str) -> str:
        """Return where `key` lies, for messages."""
        in_folder = key.startswith(STATE_PREFIX)
        return self._local.describe(key) if in_folder else f"{self.location}/{check_key(key)}"

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""
        check_key(key)
        for _ in range(2):  # it may be sent in between
            if (sent := self._sent(key)) is not None:
                return sent.stat
            if self._waits(key):
                with contextlib.suppress(StorageError):
                    return self._local.stat(key)
        if (file := self._on_branch(key)) is not None:
            return ObjectStat(file.size_bytes, file.version)
        raise self._missing("looking up", key)

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""
        # In this order: what is sent is removed after it was recorded.
        return self._waits(key) or self._sent(key) is not None or self._on_branch(key) is not None

    def _on_branch(self, key: str) -> HubFile | None:
        return None if key.startswith(STATE_PREFIX) else self._files.get(key)

    def _missing(self, doing: str, key: str) -> MissingObjectError:
        return MissingObjectError(
            f"{doing} {self.describe(key)} failed: there is no such file, in the repository or "
            f"among those that wait in {self._local.root}."
        )

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of objects, and of folders."""
        prefix = f"{folder}/" if folder else ""
        names = [key.removeprefix(prefix) for key in self.list(prefix)]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        files = (name for name in names if "/" not in name)
        return sorted(prefix + name for name in files), sorted(prefix + name for name in folders)

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted, but no unfinished ones and no lock."""
        keys = set(self._local.list(prefix))
        if not prefix.startswith(STATE_PREFIX):
            if self._is_void:
                keys = {key for key in keys if key.startswith(STATE_PREFIX)}
            else:
                keys.update(shard.name for shard in self._staging.all_uploaded())
            keys.update(self._files)
        return sorted(key for key in keys if key.startswith(prefix))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""
        return self._source(key).read(key, start, stop)

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> Reader:
        """Open `key` for reading."""
        return self._source(key).open_reader(key, planned, ahead)

    def _source(self, key: str) -> LocalStore | HubFiles:
        if self._waits(check_key(key)):
            return self._local
        if self._sent(key) is not None:
            raise StorageError(
                f"reading {self.describe(key)} failed: its bytes are on the Hub, and can be read "
                "once the run is complete. Run the same command again."
            )
        if self._on_branch(key) is None:
            raise self._missing("reading", key)
        commit = self._head.commit
        return HubFiles(f"{HUB_PREFIX}{self._repository}@{commit}", self._connections)

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return which of `keys` are links in the folder here."""
        return self._local.links(keys)

    def check(self, key: str) -> None:
        """Do nothing: repositories that are written here have no links."""

    def sample(self, key: str, size_bytes: int) -> str:
        """Return nothing: the version tells the content."""
        return ""

    def as_seen_here(self, shard: ShardFile) -> ShardFile:
        """Return the shard: its version is the same everywhere."""
        return shard

    def refuse_changed(self, shard: ShardFile) -> None:
        """Do nothing: an output is no input."""

    def known_sha256(self, key: str) -> str | None:
        """Return the SHA-256 of a shard that the Hub has; '' if it lost one that was sent."""
        if (sent := self._sent(key)) is not None:
            if self._client.lost([sent]):
                self._lost.add(key)
                return ""
            return sent.sha256
        file = None if self._waits(key) else self._on_branch(key)
        return file.version if file is not None and len(file.version) == 64 else None

    def taken(self, keys: Iterable[str]) -> Sequence[str]:
        """Return those of `keys` whose place is taken."""
        there = self.list()
        files = set(there)
        folders = {
            "/".join(key.split("/")[:i]) for key in there for i in range(1, key.count("/") + 1)
        }

        def is_taken(key: str) -> bool:
            parts = check_key(key).split("/")
            above = {"/".join(parts[:i]) for i in range(1, len(parts))}
            return key in files or key in folders or bool(above & files)

        return sorted(filter(is_taken, keys))
