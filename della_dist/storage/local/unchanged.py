"""Whether the local files of a checkpoint are still those that the merge was planned with.

Within a run, any difference counts: what was read before and after it does not belong together.
Between runs, and between the machines of one, only the content does; see
`della_dist.planning.fingerprint.differences`.
"""

from __future__ import annotations

from dataclasses import replace

from della_dist.errors import InputChangedError
from della_dist.specs.checkpoint import FileVersion, ShardFile
from della_dist.storage.local.store import LocalStore


def refuse_changed(store: LocalStore, shard: ShardFile) -> None:
    """Raise `InputChangedError` unless a shard is the very file that it was.

    A file system of the user's (sshfs, gcsfuse) may give an untouched file another inode: where
    nothing else differs, the content decides.
    """
    now = store.stat_anew(shard.name)
    if now is None:
        raise _changed(store, shard, "it is not there any more")
    if (now.size_bytes, now.version) == (shard.size_bytes, shard.version):
        return
    old, new = FileVersion.parse(shard.version), FileVersion.parse(now.version)
    assert old is not None
    assert new is not None
    if now.size_bytes != shard.size_bytes:
        what = f"its size was {shard.size_bytes} bytes, now {now.size_bytes}"
    elif new.inode != old.inode:
        if replace(new, inode=old.inode) == old and _has_content(store, shard):
            return
        what = "another file has taken its place"
    else:
        what = new.rewritten(old) or (
            "its status was changed, as by a program that writes to it and sets its time back"
        )
    raise _changed(store, shard, what)


def as_seen_here(store: LocalStore, shard: ShardFile) -> ShardFile:
    """Return a shard that was planned on another machine with the version it has on this one.

    Raises
    ------
    InputChangedError
        If it has not the content that it was planned with, or was written to since.
    """
    now = store.stat(shard.name)
    if now.version != shard.version:
        old, new = FileVersion.parse(shard.version), FileVersion.parse(now.version)
        if now.size_bytes != shard.size_bytes or (old and new and new.rewritten(old)):
            refuse_changed(store, shard)
        if not _has_content(store, shard):
            raise _changed(store, shard, "it has other content here than where it was planned")
    return replace(shard, version=now.version)


def _has_content(store: LocalStore, shard: ShardFile) -> bool:
    return shard.sample == store.sample(shard.name, shard.size_bytes)


def _changed(store: LocalStore, shard: ShardFile, what: str) -> InputChangedError:
    """Return the error for a shard that is not what it was."""
    return InputChangedError(
        f"{store.describe(shard.name)} was changed while the merge was running: {what}. What was "
        "read before and after does not belong together. Put the old file back and run the same "
        "command again, or merge the new one with --restart."
    )
