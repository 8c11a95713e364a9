"""What an output tensor is made of: a small immutable expression over stored tensors.

Planning asks it what is read; the runtime opens what it names; the kernels see blocks of raw bytes.
A kind of source that is not handled somewhere is an error of mypy there, not a silent default.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.runs import Runs

Key: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes as a file has them."""

    checkpoint: int
    """Index into the inputs of the plan, the reference first."""
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """Safetensors name."""
        return self.entry.dtype

    @property
    def key(self) -> Key:
        """What tells it from other stored tensors."""
        return self.checkpoint, *self.entry.place


@dataclass(frozen=True, slots=True)
class MeanRow:
    """One row, which stands wherever it is asked for: the mean of rows of a stored tensor.

    The mean of one row is that row, to the bit. Resident.
    """

    of: Stored
    first: int
    count: int
    row_elements: int

    @property
    def dtype(self) -> str:
        """Safetensors name."""
        return self.of.dtype

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return *self.of.key, self.first, self.count


@dataclass(frozen=True, slots=True)
class Mean:
    """Element by element, the mean of several.

    They are added up in order in float32, or in float64 if any is F64, divided by their number, and
    rounded to `dtype`.
    """

    sources: tuple[Rows, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows, put together of others.

    Rows are along the first axis that has more than one entry. Values that have another dtype
    become `dtype`, which holds them exactly.
    """

    checkpoint: int
    """Whose tensor it stands for."""
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[Stored | MeanRow | Mean, ...]
    """Of a `Mean`, rows have the numbers that they have here."""
    runs: Runs

    @property
    def row_elements(self) -> int:
        """Elements of a row."""
        return num_elements(self.shape) // self.runs.num_rows


def stored(checkpoint: int, entry: TensorEntry) -> Stored | Rows:
    """Return a tensor of a checkpoint as its files have it: in one piece, or in several."""
    if not entry.pieces:
        return Stored(checkpoint, entry)
    size = 1 if len(entry.shape) < 2 else entry.shape[-1]
    rows = [num_elements(piece.shape) // size for piece in entry.pieces]
    starts = array("i", (0, *accumulate(rows[:-1])))
    runs = Runs(sum(rows), starts, array("i", range(len(rows))), array("i", [0] * len(rows)))
    sources = tuple([Stored(checkpoint, piece) for piece in entry.pieces])
    return Rows(checkpoint, entry.shape, entry.dtype, sources, runs)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A delta: `scaling` times the product of two matrices of low rank.

    A tensor is `groups` matrices of `rows` x `cols`, one behind the other. In each::

        delta[i, j] = scaling * sum(left[i, k] * right[k, j] for k in range(rank))

    added up in order in float32, every operation rounded. Both factors are resident, wherever
    their numbers lie in the stored tensors: at the sum of index times stride, in elements. They may
    be those of a part of the tensor.
    """

    left: Stored
    right: Stored
    scaling: float
    groups: int
    rows: int
    cols: int
    rank: int
    left_strides: tuple[int, int, int]
    """Of group, i and k."""
    right_strides: tuple[int, int, int]
    """Of group, k and j."""
    left_start: int = 0
    right_start: int = 0
    """Where the numbers begin in the stored tensors, in elements."""
    first_row: int = 0
    """Of the tensor, the row of `cols` elements that is the first of these."""

    @property
    def key(self) -> Key:
        """What tells its factors from others."""
        return *self.left.key, self.left_start, *self.right.key, self.right_start

    @property
    def left_shape(self) -> tuple[int, int, int]:
        """(groups, rows, rank)."""
        return self.groups, self.rows, self.rank

    @property
    def right_shape(self) -> tuple[int, int, int]:
        """(groups, rank, cols)."""
        return self.groups, self.rank, self.cols

    def read(self) -> tuple[tuple[Stored, int, int], tuple[Stored, int, int]]:
        """Return which elements of the stored tensors have all numbers of the factors."""
        ends = (
            sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
            for shape, strides in (
                (self.left_shape, self.left_strides),
                (self.right_shape, self.right_strides),
            )
        )
        left, right = ends
        return (
            (self.left, self.left_start, self.left_start + left),
            (self.right, self.right_start, self.right_start + right),
        )


@dataclass(frozen=True, slots=True)
class Dora:
    """The delta that is left where every row gets a length (DoRA, arXiv 2402.09353, section 4).

    With V = weight + the delta of `of`, row i of it is ``magnitude[i] / |V[i]| * V[i] - weight[i]``
    in float32; squares are added up in float64.
    """

    of: LowRank
    weight: Stored | Rows
    """The tensor of the model that the adapter was trained on."""
    magnitude: Stored
    """(rows,). Resident."""


Term: TypeAlias = LowRank | Dora


@dataclass(frozen=True, slots=True)
class Adapted:
    """A tensor that adapters change: the sum of what each adds to it, in their order."""

    checkpoint: int
    """Whose tensor it stands for."""
    shape: tuple[int, ...]
    dtype: str
    """F32; F64 where `of` has it."""
    of: Stored | Rows | None
    """What they are added to; None: the deltas alone, which may be none."""
    terms: tuple[Term, ...]


Column: TypeAlias = Stored | Rows | Adapted
"""The tensor of one checkpoint, as a merge sees it."""


@dataclass(frozen=True, slots=True)
class Same:
    """The first of several that are to hold equal bytes: integers, which are not merged."""

    sources: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """What the recipe makes of the base, if it has one, and of the experts."""

    recipe: TensorRecipe
    base: Column | None
    experts: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """One of two matrices whose product is, as far as its rank goes, the delta of a merged one.

    With the delta D, (R, C): `left` (R, rank) and `right` (rank, C), as float32. Where experts are
    adapters whose products are merely added up, these are their own, one behind the other;
    otherwise the rows of `right` are orthonormal, and ``left = D @ right.T``.
    """

    of: Merged
    side: Literal["left", "right"]
    rank: int
    """Of the two; at most what the matrix can have."""
    is_turned: bool
    """Whether it is written transposed."""
    is_sum: bool
    """Whether the experts are adapters whose products are added up."""


@dataclass(frozen=True, slots=True)
class Balanced:
    """A matrix, or a stack of them, whose deltas are merged as a whole (`Balance`)."""

    of: Merged
    is_turned: bool
    """Whether a matrix is merged as its transpose."""
    is_kernel: bool = False
    """Whether three axes are those of filters, each of them a row, and not a stack of matrices."""


Source: TypeAlias = Stored | Rows | Same | Merged | Balanced | Factor


def columns(source: Source) -> tuple[Column, ...]:
    """Return the tensor of every checkpoint that `source` is made of, in its order."""
    match source:
        case Stored() | Rows():
            return (source,)
        case Same(sources):
            return sources
        case Merged(_, base, experts):
            return experts if base is None else (base, *experts)
        case Balanced(of):
            return columns(of)
        case Factor(of, is_sum=is_sum):
            return of.experts if is_sum else columns(of)
