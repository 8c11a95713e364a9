"""Whether a local file of a checkpoint is still the one that the merge was planned with.

Within a run, any difference counts: what was read before and after it does not belong together.
Between runs, and between the machines of one, only the content does; see
`della_dist.planning.fingerprint.differences`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from della_dist.errors import InputChangedError
from della_dist.specs.checkpoint import FileVersion, ShardFile
from della_dist.storage.store import ObjectStat


def refuse_changed(
    where: str, shard: ShardFile, now: ObjectStat | None, sample: Callable[[], str]
) -> None:
    """Raise `InputChangedError` unless a shard is the very file that it was.

    A file system of the user's (sshfs, gcsfuse) may give an untouched file another inode: where
    nothing else differs, the content decides.

    Parameters
    ----------
    where
        Its path, for the message.
    shard
        As it was planned.
    now
        Its size and version now; None if it is gone.
    sample
        Returns the digest of its sampled blocks now.
    """
    if now is None:
        raise _changed(where, "it is not there any more")
    if (now.size_bytes, now.version) == (shard.size_bytes, shard.version):
        return
    old, new = FileVersion.parse(shard.version), FileVersion.parse(now.version)
    assert old is not None
    assert new is not None
    if now.size_bytes != shard.size_bytes:
        what = f"its size was {shard.size_bytes} bytes, now {now.size_bytes}"
    elif new.inode != old.inode:
        if replace(new, inode=old.inode) == old and sample() == shard.sample:
            return
        what = "another file has taken its place"
    else:
        what = new.rewritten(old) or (
            "its status was changed, as by a program that writes to it and sets its time back"
        )
    raise _changed(where, what)


def as_seen_here(
    where: str, shard: ShardFile, now: ObjectStat, sample: Callable[[], str]
) -> ShardFile:
    """Return a shard that was planned on another machine with the version it has on this one.

    Parameters are those of `refuse_changed`.

    Raises
    ------
    InputChangedError
        If it has not the content that it was planned with, or was written to since.
    """
    if now.version != shard.version:
        old, new = FileVersion.parse(shard.version), FileVersion.parse(now.version)
        if now.size_bytes != shard.size_bytes or (old and new and new.rewritten(old)):
            refuse_changed(where, shard, now, sample)
        if sample() != shard.sample:
            raise _changed(where, "it has other content here than where it was planned")
    return replace(shard, version=now.version)


def _changed(where: str, what: str) -> InputChangedError:
    """Return the error for a shard that is not what it was."""
    return InputChangedError(
        f"{where} was changed while the merge was running: {what}. What was read before and after "
        "does not belong together. Put the old file back and run the same command again, or merge "
        "the new one with --restart."
    )
