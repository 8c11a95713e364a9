"""The folder where a run that writes to the Hub keeps its records, and files until they are sent.

A repository shows whole commits alone, and has no small conditional writes: records, the lock and
what is not sent yet lie here, as they would in the directory of a local output, and beside them::

    .della/hub/uploaded/NAME.json   a shard whose bytes the Hub has, for a commit that is to come
    .della/hub/deleted.json         files of the branch that the commit takes away
    .della/hub/commit.json          what the commit will hold, written before it is made
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from della_dist.errors import StorageError
from della_dist.locations import absolute_path, local_path
from della_dist.storage.hub.snapshot import HubFile, constants_of
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import output_name
from della_dist.storage.sealed import seal, unseal
from della_dist.storage.store import STATE_PREFIX, ObjectStat

_RECORDS = f"{STATE_PREFIX}hub/"
_UPLOADED = f"{_RECORDS}uploaded/"
_DELETED = f"{_RECORDS}deleted.json"
_COMMIT = f"{_RECORDS}commit.json"
_STEP_BYTES = 1 << 20


def staging_folder(repository: str, branch: str, folder: str | None) -> Path:
    """Return where the files of a run lie: of one branch of one repository of one Hub.

    Parameters
    ----------
    repository, branch
        What is written to.
    folder
        Where such folders lie; None: beside the Hub's cache (``HF_HOME``).
    """
    constants = constants_of()
    above = Path(constants.HF_HOME) / "della-dist" if folder is None else local_path(folder)
    place = f"{constants.ENDPOINT} {repository} {branch}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "-", f"{repository.replace('/', '--')}--{branch}", flags=re.ASCII)
    return absolute_path(above) / f"{name[:150]}--{digest}"


@dataclass(frozen=True, slots=True)
class UploadedShard:
    """A shard whose bytes the Hub's store has, and nobody sees before the commit."""

    name: str
    size_bytes: int
    sha256: str
    version: str
    """Of the file that was sent, as the record of its task has it."""

    @property
    def stat(self) -> ObjectStat:
        """Size and version as the record of the task has them."""
        return ObjectStat(self.size_bytes, self.version)


@dataclass(frozen=True, slots=True)
class PlannedCommit:
    """What a branch holds when the commit has been made, as far as it changes that."""

    files: Mapping[str, tuple[int, str, str]]
    """Size, SHA-256 and git's id of every file that it adds; no such id of those sent before."""
    deleted: Sequence[str]

    def is_in(self, files: Mapping[str, HubFile]) -> bool:
        """Tell whether a branch with these `files` has the commit."""
        return not any(name in files for name in self.deleted) and not self.missing(files)

    def missing(self, files: Mapping[str, HubFile]) -> list[str]:
        """Return the names that a branch with these `files` lacks, or has with other bytes."""

        def is_there(name: str) -> bool:
            size_bytes, *ids = self.files[name]
            file = files.get(name)
            return file is not None and file.size_bytes == size_bytes and file.version in ids

        return [name for name in self.files if not is_there(name)]


class Staging:
    """The records of what goes to the Hub; see the module.

    Parameters
    ----------
    store
        The folder.
    """

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def files(self) -> list[str]:
        """Return the names of the files that wait here."""
        return [key for key in self._store.list() if not key.startswith(STATE_PREFIX)]

    def uploaded(self, name: str) -> UploadedShard | None:
        """Return the record of a shard that was sent; None if there is none, or a damaged one."""
        content = self._load(f"{_UPLOADED}{name}.json")
        try:
            return None if content is None else UploadedShard(**content)
        except TypeError:
            return None

    def all_uploaded(self) -> list[UploadedShard]:
        """Return the records of all shards that were sent."""
        names = (
            key.removeprefix(_UPLOADED).removesuffix(".json") for key in self._store.list(_UPLOADED)
        )
        return [record for name in names if (record := self.uploaded(name)) is not None]

    def note_upload(self, record: UploadedShard) -> None:
        """Record that a shard was sent, then remove its bytes."""
        self._store.put(f"{_UPLOADED}{record.name}.json", seal(asdict(record)))
        self._store.delete(record.name)

    def forget_upload(self, name: str) -> None:
        """Remove the record of a shard that was sent."""
        self._store.delete(f"{_UPLOADED}{name}.json")

    def deleted(self) -> Sequence[str]:
        """Return the files of the branch that the commit is to take away."""
        content = self._load(_DELETED)
        return [] if content is None else [output_name(name) for name in content["names"]]

    def delete(self, name: str) -> None:
        """Let the commit take a file of the branch away."""
        names = sorted({*self.deleted(), name})
        self._store.put(_DELETED, seal({"names": names}))

    def plan_commit(self, last: str, data: bytes, deleted: Iterable[str]) -> PlannedCommit:
        """Record what the commit is to hold: all that was sent or waits here, and `last`."""
        files = {last: (len(data), hashlib.sha256(data).hexdigest(), _git_id(len(data), [data]))}
        for shard in self.all_uploaded():
            files[shard.name] = (shard.size_bytes, shard.sha256, "")
        for name in self.files():
            if name not in files:
                files[name] = self._ids(name)
        planned = PlannedCommit(files, sorted({*deleted} - files.keys()))
        self._store.put(_COMMIT, seal(asdict(planned)))
        return planned

    def planned_commit(self) -> PlannedCommit | None:
        """Return what the commit was to hold of a run that came so far."""
        content = self._load(_COMMIT)
        if content is None:
            return None
        files = {output_name(name): (size, *ids) for name, (size, *ids) in content["files"].items()}
        return PlannedCommit(files, content["deleted"])

    def clear(self) -> None:
        """Remove what was committed: files, and the records of what was sent."""
        for name in self.files():
            self._store.delete(name)
        # What the commit held goes last: until then a rerun knows that nothing here is needed.
        records = [key for key in self._store.list(_RECORDS) if key != _COMMIT]
        for key in (*records, _COMMIT):
            self._store.delete(key)

    def _load(self, key: str) -> dict[str, Any] | None:
        try:
            content = unseal(self._store.read(key)) if self._store.exists(key) else None
        except (ValueError, StorageError):
            return None
        if content is not None:
            del content["digest"]
        return content

    def _ids(self, name: str) -> tuple[int, str, str]:
        size_bytes = self._store.stat(name).size_bytes

        def parts() -> Iterable[bytes]:
            for start in range(0, size_bytes, _STEP_BYTES):
                yield self._store.read(name, start, min(start + _STEP_BYTES, size_bytes))

        digest = hashlib.sha256()
        for part in parts():
            digest.update(part)
        return size_bytes, digest.hexdigest(), _git_id(size_bytes, parts())


def _git_id(size_bytes: int, parts: Iterable[bytes]) -> str:
    """Return what git calls a file of these bytes."""
    digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
