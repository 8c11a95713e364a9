"""What the headers and the small documents of a checkpoint say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from della_dist.specs.dtypes import num_bytes


@dataclass(frozen=True, slots=True)
class Strided:
    """How a view of other data lies in it: transposed, a part of each row, repeated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one entry of each axis to the next."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: what it is and where its bytes lie.

    A part of a tensor whose numbers lie together is one, too.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    """Index into `CheckpointIndex.shards`."""
    start: int
    """First byte of the data, counted from the beginning of the file."""
    stop: int
    """One past the last byte of the data, counted from the beginning of the file."""
    strided: Strided | None = None
    """Which of these bytes are the tensor's; None: all, in row-major order."""
    pieces: tuple[TensorEntry, ...] = ()
    """What it is put together of, one behind the other, where it does not lie in one piece: shard
    and start are then those of the first, and no other tensor's."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        if self.strided is None:
            return self.stop - self.start
        return num_bytes(self.dtype, self.strided.shape)

    @property
    def place(self) -> tuple[object, ...]:
        """What two tensors of one checkpoint share that have the same bytes for that reason."""
        return self.shard, self.start, self.stop, self.strided


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What a file system says of a file, beside its size, that changes when the file does."""

    mtime_ns: int
    """Of the last write; programs set it back at will."""
    ctime_ns: int
    """Of the last change of any kind; nobody sets it back."""
    inode: int

    def __str__(self) -> str:
        return f"{self.mtime_ns}:{self.ctime_ns}:{self.inode}"

    @classmethod
    def parse(cls, text: str) -> FileVersion | None:
        """Return the version with this text; None if it is none, but the ETag of an object."""
        try:
            mtime_ns, ctime_ns, inode = map(int, text.split(":"))
        except ValueError:
            return None
        return cls(mtime_ns, ctime_ns, inode)

    def written_since(self, before: FileVersion) -> str | None:
        """Return how a path whose file was `before` was written to since; None if it was not.

        A copy that keeps its time (``cp -p``, ``rsync -a``) was not.
        """
        if self.mtime_ns == before.mtime_ns:
            return None
        now, then = _date(self.mtime_ns), _date(before.mtime_ns)
        return f"it was written to since (last at {now}, before at {then})"

    def rewritten(self, before: FileVersion) -> str | None:
        """Return the same of one file; a copy on another machine is another file."""
        return self.written_since(before) if self.inode == before.inode else None


def _date(time_ns: int) -> str:
    try:
        return datetime.fromtimestamp(time_ns / 1e9, timezone.utc).isoformat()
    except (ValueError, OverflowError, OSError):  # programs set whatever time they like
        return f"{time_ns} ns"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of an input checkpoint, with its identity at planning time."""

    name: str
    """Path relative to the checkpoint, with forward slashes."""
    size_bytes: int
    version: str
    """Version of the bytes: the text of a `FileVersion`, or the ETag of an object."""
    header_sha256: str
    """Digest of what says which tensors it holds and where."""
    sample: str = ""
    """Digest of sampled blocks of a local file, once it is asked for: its content, whatever its
    times and its inode. Empty for an object, whose ETag says as much."""


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Headers of one checkpoint: everything that is known without reading tensor data."""

    location: str
    """Where the checkpoint is, as the user wrote it."""
    shards: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    """Names of what lies at its top level but folders, sorted: files, and whatever is none."""
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its small documents by name, parsed: what views go by (`della_dist.planning.facts`)."""
    folders: tuple[str, ...] = ()
    """Names of the folders at its top level, sorted."""
    stage: int | None = None
    """Of the merge that this checkpoint is the output of (`TensorRecipe.stage`); None: of none."""
    is_stage: bool = False
    """Whether the very run that reads it makes it, too; its shards have neither version nor sample
    until then."""
    is_adapter: bool = False
    """Whether it is an adapter of a model, and none itself."""
