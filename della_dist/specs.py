"""Frozen dataclasses that cross the rooms of the package.

`plan` makes them, `ops` and `storage` consume them, `runtime` carries them. Nothing here imports
more than the standard library, so that they are cheap to pickle and to import.

Shape legend used throughout the package: M experts, R rows, C columns (``delta_RC``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal

#: Bits of one element of every dtype of the safetensors format (version 0.8).
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: The dtypes that are merged; everything else is copied (integers, booleans) or refused.
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

#: The dtypes that are copied from the base when every checkpoint holds the same bytes.
COPY_DTYPES = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})

Drop = Literal["none", "magprune", "random", "magnitude"]
Granularity = Literal["row", "tensor"]
Rescale = Literal["inverse", "l1", "none"]
OnNonfinite = Literal["error", "zero"]


def num_elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of `shape` (1 for the empty shape of a scalar)."""
    return math.prod(shape)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of `dtype` and `shape` occupies in a file.

    Raises
    ------
    ValueError
        If `dtype` is a sub-byte type and the tensor does not end on a whole byte.
    """
    bits = DTYPE_BITS[dtype] * num_elements(shape)
    if bits % 8:
        raise ValueError(f"a {dtype} tensor of shape {shape} does not end on a whole byte")
    return bits // 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: what it is and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    """Index into `CheckpointIndex.shards`."""
    start: int
    """First byte of the data, counted from the beginning of the file."""
    stop: int
    """One past the last byte of the data, counted from the beginning of the file."""


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
    """One safetensors file of an input checkpoint, with its identity at planning time."""

    name: str
    """Path relative to the checkpoint, with forward slashes."""
    size_bytes: int
    version: str
    """Version of the bytes: the text of a `FileVersion`, or the ETag of an object."""
    header_sha256: str
    sample: str = ""
    """Digest of sampled blocks of a local file, once it is asked for: its content, whatever its
    times and its inode. Empty for an object, whose ETag says as much."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint's config.json says that decides which tensors it has, and what they are."""

    tie: bool | None = None
    """Its own ``tie_word_embeddings``; None: not given."""
    text_tie: bool | None = None
    """The one of its ``text_config``."""
    is_encoder_decoder: bool = False
    quant_method: str | None = None
    """Of its ``quantization_config``, or that of its ``text_config``; None: has none."""

    @property
    def ties_head(self) -> bool | None:
        """Whether a model without a stored head has its embedding as head; None: not said.

        Some architectures take the outer key, some the inner one, and some either.
        """
        if self.tie or self.text_tie:
            return True
        return None if self.tie is None else False


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Headers of one checkpoint: everything that is known without reading tensor data."""

    location: str
    """Where the checkpoint is, as the user wrote it."""
    shards: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    """Names of what lies at its top level but folders, sorted: files, and whatever is none."""
    model: ModelFacts = ModelFacts()
    folders: tuple[str, ...] = ()
    """Names of the folders at its top level, sorted."""
    stage: int | None = None
    """Of the merge that this checkpoint is the output of (`TensorRecipe.stage`); None: of none."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How every element of one tensor is merged (DELLA paper, section 3).

    ``weights``, ``densities`` and ``epsilons`` have one entry an expert, in the order of the
    configuration, which is also the order of every sum over experts.
    """

    drop: Drop
    elect: bool
    rescale: Rescale
    normalize: bool
    lambda_: float
    granularity: Granularity
    on_nonfinite: OnNonfinite
    seed: int
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    """Half widths of the keep-probability window; all zero unless ``drop`` is ``magprune``."""


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """Everything about one tensor but its data: enough to merge any block of it anywhere."""

    name: str
    shape: tuple[int, ...]
    base_dtype: str | None
    """None where the method has no base (``linear``): the base then counts as zero."""
    expert_dtypes: tuple[str, ...]
    out_dtype: str
    settings: MergeSettings
    stage: int = 0
    """Merges that lie one after another behind the inputs: part of the key of the random words."""


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What happened to one expert's part of one tensor."""

    num_nonzero: int
    """Elements whose delta is not zero."""
    num_kept: int
    """Elements whose delta is not zero and survived the drop step."""
    num_elected: int
    """Elements that the elect step let into the sum (all kept ones where nothing is elected)."""
    delta_l2: float
    """Euclidean norm of the delta."""
    delta_max_abs: float


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Statistics of one merged tensor."""

    num_elements: int
    num_conflicts: int
    """Elements at which the surviving contributions have both signs."""
    experts: tuple[ExpertStats, ...] = field(default=())
