"""Matrices that are merged as a whole: what every rule of `Balance` does, and which there are.

All rows of a matrix are looked at, once or more, in steps; then every row of the merged delta T
follows from the same rows of the experts' deltas. Matrices are given as the rule wants them, which
may be turned (`della_dist.specs.balancing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

from della_dist.ops.exact_products import Products
from della_dist.ops.grids import F64Array, Floats
from della_dist.ops.spectral import NOTHING, NOTHING_WIDE, IsoC, Tsv
from della_dist.ops.wudi import Wudi
from della_dist.specs.balancing import Balancing
from della_dist.specs.recipe import MergeSettings


class Whole(Protocol):
    """One matrix; M experts, r rows of a step, C columns."""

    def look(self, deltas_rC: Sequence[Floats]) -> list[Floats]:
        """Return what is to be known of some rows of the deltas; called by several threads."""

    def take(self, seen: Sequence[Floats], pool: Executor) -> None:
        """Keep what `look` returned; called for every step in the order of its rows."""

    def solve(self, pool: Executor) -> None:
        """All rows were looked at: find what follows."""

    def merged(self, deltas_rC: Sequence[Floats]) -> F64Array:
        """Return rows of T, (r, C), once all is solved; called by several threads.

        Those of the next call of the same thread may overwrite them.
        """


def whole(
    how: Balancing,
    settings: MergeSettings,
    largest: Sequence[float],
    together: int,
    products: Products,
) -> Whole:
    """Return one matrix, before it is looked at.

    Parameters
    ----------
    how
        How it is merged.
    settings
        Of its tensor.
    largest
        Magnitudes that the experts' deltas have at most.
    together
        How many matrices may be decomposed at once, where there are several.
    products
        Where integers are multiplied. Singular values are LAPACK's, on the host: their bytes hang
        on it.
    """
    assert settings.balance is not None
    nothing = NOTHING_WIDE if how.itemsize == 8 else NOTHING
    match settings.balance.rule:
        case "wudi":
            return Wudi(settings, how, largest, products)
        case "iso_c":
            return IsoC(settings, how.width, nothing)
        case "tsv":
            return Tsv(settings, how.width, nothing, together)
