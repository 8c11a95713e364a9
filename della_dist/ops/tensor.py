"""Merging one tensor from Python: the loop over passes and blocks, without files.

This is what `della_dist.ops` offers to other programs, and the shortest correct use of a
`Backend`; the runtime does the same with blocks that come from storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from della_dist.errors import TensorDataError
from della_dist.ops.blocks import Backend, Block, BlockStats, U8Array, combine_stats
from della_dist.ops.measurements import merge_measurements
from della_dist.ops.prepare import Ready, absorb, prepare
from della_dist.specs.balancing import can_be_balanced
from della_dist.specs.dtypes import itemsize, num_bytes
from della_dist.specs.recipe import MergeSettings, TensorRecipe
from della_dist.specs.rows import row_view
from della_dist.specs.statistics import TensorStats

BackendName = Literal["numba", "torch"]

#: Elements of a block unless the caller says otherwise.
BLOCK_ELEMENTS = 1 << 22

_DTYPE_NAMES = {"float16": "F16", "uint16": "BF16", "float32": "F32", "float64": "F64"}


def load_backend(name: BackendName, device: str = "cpu") -> Backend:
    """Return a backend, importing Numba or torch only now.

    The reference is none: it merges whole tensors (`merge_tensor`).

    Raises
    ------
    ValueError
        If `name` is unknown, or if the backend does not run on `device` or not at all (Numba with
        NUMBA_DISABLE_JIT set).
    """
    if name == "torch":
        from della_dist.ops.gpu.backend import TorchBackend

        return TorchBackend(device)
    if name != "numba":
        raise ValueError(f"unknown backend {name!r}: use 'numba', 'torch' or 'reference'")
    if device != "cpu":
        raise ValueError(f"the numba backend runs on the CPU, not on {device!r}: use 'torch'")
    from numba.core import config

    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise ValueError("NUMBA_DISABLE_JIT is set, and its kernels cannot run as Python")
    from della_dist.ops.cpu.backend import NumbaBackend

    return NumbaBackend()


def merge_tensor(
    recipe: TensorRecipe,
    base: U8Array | None,
    experts: Sequence[U8Array],
    *,
    backend: BackendName | Literal["reference"] | Backend = "numba",
    device: str = "cpu",
    block_elements: int | None = None,
) -> tuple[U8Array, TensorStats]:
    """Merge one whole tensor that is in memory.

    Parameters
    ----------
    recipe
        What to do.
    base, experts
        The raw little-endian bytes of each checkpoint's tensor: uint8, of any alignment,
        ``num_bytes(dtype, shape)`` of them. `base` is None where the recipe has none.
    backend
        Its name, or the backend itself. ``"reference"`` is plain, slow numpy.
    device
        A torch device; ``"cpu"`` for the other backends.
    block_elements
        About how many elements to merge at a time; the result does not depend on it.

    Returns
    -------
    tuple
        The raw bytes of the merged tensor, uint8, and its statistics.

    Raises
    ------
    TensorDataError
        If a delta is not finite (unless ``recipe.settings.on_nonfinite`` is ``"zero"``), or if
        an element that is finite in the base is not finite in the output.
    ValueError
        If the arrays do not match the recipe, keep probabilities are not in (0, 1], or the recipe
        is of a method on whole matrices.
    """
    _check_sizes(recipe, base, experts)
    _check_window(recipe.settings)
    if recipe.settings.balance is not None and can_be_balanced(recipe.shape):
        raise ValueError(
            f"tensor {recipe.name!r}: {recipe.settings.balance.rule} merges matrices as a whole, "
            "which `della_dist.merge` does, not block by block"
        )
    if backend == "reference":
        from della_dist.ops.reference import merge_whole

        out, stats = merge_whole(recipe, base, experts)
        _check_deltas(recipe, stats.num_nonfinite)
        _check_overflow(recipe, stats.num_overflow)
        return out, combine_stats(recipe, [stats])
    if isinstance(backend, str):
        backend = load_backend(backend, device)
    spans = list(block_spans(recipe, block_elements or BLOCK_ELEMENTS))
    prepared = prepare(recipe)
    while not isinstance(prepared, Ready):
        measured = (
            backend.measure(recipe, prepared, slice_block(recipe, base, experts, *span))
            for span in spans
        )
        total = reduce(merge_measurements, measured)
        _check_deltas(recipe, total.num_nonfinite)
        prepared = absorb(recipe, prepared, total)
    out = np.empty(num_bytes(recipe.out_dtype, recipe.shape), np.uint8)
    size = itemsize(recipe.out_dtype)
    blocks: list[BlockStats] = []
    num_nonfinite = np.zeros(len(experts), np.int64)
    for start, stop in spans:
        block = slice_block(recipe, base, experts, start, stop)
        part = out[start * size : stop * size]
        blocks.append(backend.merge(recipe, prepared, block, part))
    for b in blocks:
        num_nonfinite += b.num_nonfinite
    _check_deltas(recipe, num_nonfinite)
    _check_overflow(recipe, sum(b.num_overflow for b in blocks))
    return out, combine_stats(recipe, blocks)


def merge_arrays(
    settings: MergeSettings,
    base: npt.NDArray[Any] | None,
    experts: Sequence[npt.NDArray[Any]],
    *,
    name: str = "tensor",
    out_dtype: str | None = None,
    is_delta: Sequence[bool] = (),
    backend: BackendName | Literal["reference"] = "numba",
    device: str = "cpu",
) -> tuple[npt.NDArray[Any], TensorStats]:
    """Merge one tensor given as numpy arrays of one shape.

    Parameters
    ----------
    settings
        How to merge.
    base, experts
        float16, float32 or float64 arrays, in any mixture; uint16 arrays hold the bits of
        bfloat16 numbers. `base` None counts as zeros.
    name
        The tensor's name, which selects its random words.
    out_dtype
        F16, BF16, F32 or F64; by default that of the base, or of the first expert.
    is_delta
        Which experts are deltas themselves (task vectors); empty: none is.
    backend, device
        As in `merge_tensor`.

    Returns
    -------
    tuple
        The merged array (uint16 for BF16) and its statistics.

    Raises
    ------
    TensorDataError
        As in `merge_tensor`.
    ValueError
        If something that must be an array is none, shapes or numbers of entries differ, a dtype
        is not a floating-point one, keep probabilities are not in (0, 1], or the method is one on
        whole matrices.
    """
    experts = list(experts)
    arrays = experts if base is None else [base, *experts]
    if not experts:
        raise ValueError(f"tensor {name!r}: no expert was given")
    for array in arrays:
        if not isinstance(array, np.ndarray):
            raise ValueError(  # noqa: TRY004
                f"tensor {name!r}: numpy arrays are merged, and a {type(array).__name__} was given"
            )
    shape = arrays[0].shape
    for array in arrays:
        if array.shape != shape:
            raise ValueError(f"tensor {name!r}: the shapes {shape} and {array.shape} differ")
        if array.dtype.name not in _DTYPE_NAMES:
            raise ValueError(
                f"tensor {name!r}: {array.dtype} arrays cannot be merged; use float16, float32, "
                "float64, or uint16 for the bits of bfloat16"
            )
    if out_dtype not in (None, *_DTYPE_NAMES.values()):
        raise ValueError(f"out_dtype is {out_dtype!r}; it must be F16, BF16, F32 or F64")
    dtypes = [_DTYPE_NAMES[array.dtype.name] for array in arrays]
    raw = [_raw_bytes(array) for array in arrays]
    num_base = len(arrays) - len(experts)
    recipe = TensorRecipe(
        name=name,
        shape=shape,
        base_dtype=dtypes[0] if num_base else None,
        expert_dtypes=tuple(dtypes[num_base:]),
        out_dtype=out_dtype or dtypes[0],
        settings=settings,
        is_delta=_booleans(is_delta),
    )
    out, stats = merge_tensor(
        recipe, raw[0] if num_base else None, raw[num_base:], backend=backend, device=device
    )
    numpy_name = next(k for k, v in _DTYPE_NAMES.items() if v == recipe.out_dtype)
    return out.view(np.dtype(numpy_name).newbyteorder("<")).reshape(shape), stats


def _booleans(given: Any) -> tuple[bool, ...]:  # noqa: ANN401
    if isinstance(given, str) or not hasattr(given, "__len__"):
        raise ValueError(f"is_delta is {given!r}; it must be a sequence of True and False")
    return tuple(map(bool, given))


def block_spans(recipe: TensorRecipe, block_elements: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of blocks of whole units, of about `block_elements` elements each."""
    view = row_view(recipe)
    step = view.unit * max(1, block_elements // view.unit)
    for start in range(0, view.num_elements, step):
        yield start, min(start + step, view.num_elements)


def slice_block(
    recipe: TensorRecipe, base: U8Array | None, experts: Sequence[U8Array], start: int, stop: int
) -> Block:
    """Return elements `start` to `stop` of whole tensors, without copying."""

    def part(raw: U8Array, dtype: str) -> U8Array:
        size = itemsize(dtype)
        return raw[start * size : stop * size]

    return Block(
        start=start,
        stop=stop,
        base=None if base is None or recipe.base_dtype is None else part(base, recipe.base_dtype),
        experts=tuple(part(e, d) for e, d in zip(experts, recipe.expert_dtypes, strict=True)),
    )


def _raw_bytes(array: npt.NDArray[Any]) -> U8Array:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)


def _check_sizes(recipe: TensorRecipe, base: U8Array | None, experts: Sequence[U8Array]) -> None:
    if len(experts) != len(recipe.expert_dtypes):
        raise ValueError(
            f"tensor {recipe.name!r}: {len(experts)} experts were given, "
            f"the recipe has {len(recipe.expert_dtypes)}"
        )
    if (base is None) != (recipe.base_dtype is None):
        raise ValueError(
            f"tensor {recipe.name!r}: a base is needed exactly where the recipe has one"
        )
    given = [
        (f"expert {m}", e, d)
        for m, (e, d) in enumerate(zip(experts, recipe.expert_dtypes, strict=True))
    ]
    if base is not None and recipe.base_dtype is not None:
        given.append(("the base", base, recipe.base_dtype))
    for who, raw, dtype in given:
        expected = num_bytes(dtype, recipe.shape)
        if raw.dtype != np.uint8 or raw.shape != (expected,):
            raise ValueError(
                f"tensor {recipe.name!r}, {who}: expected {expected} uint8 for {dtype} of shape "
                f"{recipe.shape}, got {raw.dtype} of shape {raw.shape}"
            )


def _check_window(settings: MergeSettings) -> None:
    for density, epsilon in zip(settings.densities, settings.epsilons, strict=True):
        half = epsilon if settings.drop == "magprune" else 0.0
        if not (0 < density <= 1 and 0 <= half < density and density + half <= 1):
            raise ValueError(
                f"density {density} with epsilon {half} gives keep probabilities outside of (0, 1]"
            )


def _check_deltas(recipe: TensorRecipe, num_nonfinite: npt.NDArray[np.int64]) -> None:
    if recipe.settings.on_nonfinite == "zero":
        return
    for m, count in enumerate(num_nonfinite):
        if count:
            raise TensorDataError(
                f"tensor {recipe.name!r}, expert {m}: {count} deltas are NaN or infinite; repair "
                "the checkpoint, or set on_nonfinite: zero to count them as unchanged"
            )


def _check_overflow(recipe: TensorRecipe, num_overflow: int) -> None:
    if num_overflow:
        raise TensorDataError(
            f"tensor {recipe.name!r}: {num_overflow} merged elements do not fit into "
            f"{recipe.out_dtype}; use a wider out_dtype, or smaller weights or lambda"
        )
