"""Which elements of a block all experts together keep: the calls of the kernels that tell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import SQUARES_SUMS, U8Array
from della_dist.ops.cpu.arguments import Divergence, Products, Scores, Scratch, Selection
from della_dist.ops.cpu.band import CHUNK_ELEMENTS
from della_dist.ops.cpu.call import NO_SELECTION, Call
from della_dist.ops.cpu.divergence import make_divergence_block
from della_dist.ops.cpu.kept import make_kept_block
from della_dist.ops.cpu.scores import make_score_block
from della_dist.ops.cpu.support import source_digest
from della_dist.ops.measurements import Counted, Multiplied, multiplied
from della_dist.ops.prepare import Counting, Prepared, Squaring
from della_dist.specs.passes import is_scored, keeps_divergences
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import row_view

_divergence_block = make_divergence_block(source_digest())
_score_block = make_score_block(source_digest())
_kept_block = make_kept_block(source_digest())


def scoring_bytes(recipe: TensorRecipe, block_elements: int) -> int:
    """Return the bytes that scores of a block take beside the scratch of the kernels."""
    if not is_scored(recipe):
        return 0
    # Divergences of rows, twice, and the mask.
    rows = block_elements // max(1, row_view(recipe).num_cols) + 1
    return 16 * rows + block_elements


def scored(
    recipe: TensorRecipe,
    call: Call,
    scratch: Scratch,
    prepared: Prepared,
    selection: Selection,
    mask: U8Array,
) -> tuple[npt.NDArray[np.int64], list[tuple[int, npt.NDArray[np.float64]]]]:
    """Count the scores of a block, or write its mask where there is one; it has elements.

    Returns
    -------
    tuple
        How many deltas are not finite, (M,), and divergences that were computed and are kept
        (`Selected.divergences`).
    """
    number = np.float64 if call.layout.wide else np.float32
    cols, divergences = 0, np.empty(0, number)
    kept: list[tuple[int, npt.NDArray[np.float64]]] = []
    if recipe.settings.drop == "importance":
        cols = row_view(recipe).num_cols
        first = call.span.start // cols
        if prepared.divergences is None:
            found = _divergences(call, scratch, cols)
            kept = [(first, found)] if keeps_divergences(recipe) else []
        else:
            found = prepared.divergences[first : first + call.span.num_elements // cols]
        divergences = found.astype(number)
    tally = call.new_tally()
    scores = Scores(cols, divergences, call.experts.thresholds[:1], mask)
    _score_block(call.span, call.inputs, call.experts, scratch, tally, scores, selection)
    num_nonfinite: npt.NDArray[np.int64] = tally.counts[:, 0].copy()
    return num_nonfinite, kept


def _divergences(call: Call, scratch: Scratch, cols: int) -> npt.NDArray[np.float64]:
    divergence = Divergence(
        cols=cols,
        ones=np.ones(CHUNK_ELEMENTS),
        sums=np.zeros((3, 1)),
        chunk_sums=np.zeros((3, SQUARES_SUMS)),
        result=np.empty(call.span.num_elements // cols),
    )
    _divergence_block(call.span, call.inputs, call.experts, scratch, call.new_tally(), divergence)
    return divergence.result


def measure_kept(
    recipe: TensorRecipe, call: Call, scratch: Scratch, prepared: Squaring | Counting
) -> Multiplied | Counted:
    """Return the squares of what is kept of a block that has elements, or what of it is shared."""
    num_experts, num_elements = call.layout.num_experts, call.span.num_elements
    mask = np.empty(0, np.uint8)
    if is_scored(recipe):
        mask = np.empty(num_elements, np.uint8)
        scored(recipe, call, scratch, prepared, NO_SELECTION, mask)
    is_squaring = isinstance(prepared, Squaring)
    num_units = -(-num_elements // call.span.unit)
    products = Products(
        sums=np.zeros((num_experts if is_squaring else 0, num_units)),
        chunk_sums=np.zeros((num_experts, SQUARES_SUMS)),
    )
    counts = np.zeros((num_experts, 2), np.int64)
    present = np.zeros(0 if is_squaring else call.layout.band, np.uint32)
    tally = call.new_tally()
    _kept_block(
        call.span,
        call.inputs,
        call.experts,
        scratch,
        tally,
        mask.ctypes.data if mask.size else 0,
        products,
        counts,
        present,
    )
    num_nonfinite = tally.counts[:, 0].copy()
    if is_squaring:
        return multiplied(num_nonfinite, products.sums)
    return Counted(num_nonfinite, counts[:, 0].copy(), counts[:, 1].copy())
