"""What the kernels are called with: records by name, which Numba compiles and caches as tuples.

M experts, U units in the block, N elements of a band, C elements of a chunk. Numbers are float32,
or float64 where any input is; keys are unsigned integers of as many bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]


class Span(NamedTuple):
    """The block, and how it is seen."""

    start: int
    """Position of its first element in the tensor."""
    num_elements: int
    cols: int
    """Elements of a row; of a band where nothing is ranked."""
    unit: int


class Drop(NamedTuple):
    """How elements are dropped."""

    ranked: bool
    random: bool
    has_ceilings: bool
    """Whether the largest magnitudes are dropped too."""
    mask: int
    """Address of the block's mask: bytes, 0 where no expert's element is kept; 0: no mask."""


class Divergence(NamedTuple):
    """The divergences of R rows, one after another. See `della_dist.ops.divergence`."""

    cols: int
    """Elements of a row."""
    ones: Array
    """(C,) float64."""
    sums: Array
    """(3, 1) float64: of exponentials, of expert and base, and of what a row's divergence is."""
    chunk_sums: Array
    """(3, 16) float64, zero before and after: of a chunk that is not complete."""
    result: Array
    """(R,) float64, written."""


class Scores(NamedTuple):
    """What decides, for all experts together, which elements are kept."""

    cols: int
    """Elements of a row with a divergence of its own; 0 where variances are the scores."""
    divergences: Array
    """(R,) numbers."""
    threshold: Array
    """(1,) keys: the least score that is kept."""
    mask: Array
    """(n,) uint8, written: which elements are kept. Empty where scores are counted."""


class Fusion(NamedTuple):
    """How the survivors are put together."""

    inverse: bool
    """Whether survivors are divided by their keep probability; else they are multiplied."""
    elect: bool
    normalize: bool
    late: bool
    """Whether weights join what is elected only: `weights` are all 1 then."""
    overlap: bool
    """Whether each element is divided by the number of experts that have something there."""
    weights: Array
    """(R, M) numbers: R is 1, or as many as rows have weights of their own."""
    shares: Array
    """(M,) numbers: what an expert's contribution counts in the divisor; with `overlap` what it is
    multiplied by where no other has one."""
    row_elements: int
    """Elements that have the same weights."""
    ratios: Array
    """(M,) numbers: what survivors are multiplied by."""
    constants: Array
    """(3,) numbers: the least sum of weights that divides, lambda, and the magnitude that
    deltas are cut to."""


class Inputs(NamedTuple):
    """Where the base's bytes lie, then those of the experts; address 0: no base."""

    codes: Array
    """(M + 1,) int64, of the dtypes."""
    addresses: Array
    """(M + 1,) uint64."""


class Experts(NamedTuple):
    """What the experts are, and what decides which elements of each are kept."""

    is_delta: Array
    """(M,) bool: from which the base is not subtracted."""

    keys: Array
    """(M,) uint64, of the random words."""
    densities: Array
    """(M,) float64."""
    epsilons: Array
    """(M,) float64."""
    tables: Array
    """(M,) uint64: addresses of tables of keep probabilities, 0 where there is none."""
    const_p: Array
    """(M,) float32: the keep probability of every element where ranks do not matter."""
    thresholds: Array
    """(M,) keys: the least magnitude that is kept, as an integer."""
    ceilings: Array
    """(M,) keys: the largest that is, where there is one."""


class Output(NamedTuple):
    """Where the merged block goes."""

    code: int
    address: int


class Tally(NamedTuple):
    """Counts of deltas, added to."""

    counts: Array
    """(M, 4) int64: non-finite, non-zero, kept and elected ones."""
    max_bits: Array
    """(M,) keys: the largest magnitude as an integer."""


class Totals(NamedTuple):
    """Sums over the block, added to."""

    squares: Array
    """(M + 1, U) float64: of every unit, of the experts' deltas and of the merged one."""
    dots: Array
    """(M, U) float64: of every unit, of the products of each expert's deltas and the merged one."""
    chunk_sums: Array
    """(2M + 1, 16) float64, zero before and after: of a chunk that is not complete."""
    merged_max_bits: Array
    """(1,) keys: the largest magnitude of the merged delta as an integer."""
    totals: Array
    """(2,) int64: conflicts, and outputs that overflowed."""


class Products(NamedTuple):
    """Products of the deltas of P pairs of experts, added to."""

    sums: Array
    """(P, U) float64: of every unit."""
    chunk_sums: Array
    """(P, 16) float64, zero before and after: of a chunk that is not complete."""


class Selection(NamedTuple):
    """A pass of the radix select; see `della_dist.ops.prepare`."""

    shift: int
    bits: int
    prefix: Array
    """(S,) uint64."""
    active: Array
    """(S,) bool: which searches are counted."""
    counts: Array
    """(S, 65536) int64, added to; S is 0 where nothing is selected, here and below."""
    key_min: Array
    """(S, 65536) uint64, lowered."""
    key_max: Array
    """(S, 65536) uint64, raised."""


class Work(NamedTuple):
    """Scratch of a band and of its chunks."""

    v: Array
    """(M, N) numbers: deltas."""
    w: Array
    """(M, N) numbers: contributions."""
    b: Array
    """(N,) numbers: the base."""
    p: Array
    """(N,) float32: keep probabilities."""
    pairs: Array
    """(C / 2 + 4,) uint64: random words, two in each."""
    staging: Array
    """uint8, of conversions."""
    sums: Array
    """(4, C) numbers."""
    signs: Array
    """(C,) uint32."""
    rows: Array
    """(2, K) float64: of an expert and of the base, a whole row or a chunk, or a mean and a sum; K
    is 0 without scores."""


class SlotScratch(NamedTuple):
    """Scratch of `della_dist.ops.cpu.slots`; the counters are zero before and after."""

    slot_of: Array
    counts16: Array
    counts32: Array
    slot_p: Array
    below: Array
    filled: Array
    filled_counts: Array


class SortScratch(NamedTuple):
    """Scratch of `della_dist.ops.cpu.sort`."""

    keys_a: Array
    keys_b: Array
    order_a: Array
    order_b: Array
    digits: Array


class RankScratch(NamedTuple):
    """Scratch of ranking a row; empty where nothing is ranked."""

    slots: SlotScratch
    sort: SortScratch


class Scratch(NamedTuple):
    """All of it."""

    work: Work
    ranks: RankScratch
