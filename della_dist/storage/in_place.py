"""What a store does at the end of a shard and of an output, where objects are where they belong."""

from __future__ import annotations

from abc import ABC, abstractmethod

from della_dist.storage.store import ObjectStat


class InPlace(ABC):
    """A part of `della_dist.storage.store.OutputStore` that most stores have alike."""

    __slots__ = ()

    location: str

    @abstractmethod
    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""

    @property
    def shards_location(self) -> str:
        """The root itself."""
        return self.location

    def settle(self, key: str, committed: ObjectStat, sha256: str) -> None:
        """Do nothing: a shard is where it belongs."""
        return

    def complete(self, key: str, data: bytes) -> ObjectStat:
        """Write the last object of an output."""
        return self.put(key, data)

    def known_sha256(self, key: str) -> str | None:
        """Return None: file systems know no digest, and object stores another one."""
        return None
