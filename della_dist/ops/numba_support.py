"""Small things the Numba kernels share: the decorator, views of addresses, bits of numbers.

Kernels are serial and release the GIL: threads of our own call them on different blocks. No
``fastmath``: LLVM then contracts and reorders nothing, which equal bytes everywhere rest on.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np

from della_dist.ops.numba_intrinsics import float_bits

Function = TypeVar("Function", bound=Callable[..., Any])

#: Numba infers types; these say what the kernels' arguments are: contiguous arrays, scalars of
#: Numba or numpy, and tuples of either.
Array: TypeAlias = Any
Number: TypeAlias = Any
Pack: TypeAlias = Any

#: Codes of the dtypes, as the kernels take them.
DTYPE_CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
BF16, F16, F32, F64 = (np.int64(code) for code in range(4))

#: Modules whose code ends up in the cached kernels.
_SOURCES = (
    *("support", "intrinsics", "philox", "convert", "slots", "sort", "rank"),
    *("band", "merge", "measure"),
)


# Without "nrt" arrays are not reference-counted: a kernel gets memory, it never allocates any.
_njit: Any = partial(numba.njit, nogil=True, error_model="numpy", _nrt=False)


def inner(function: Function) -> Function:
    """Compile a function that kernels call: typed Python, not cached by itself."""
    return cast(Function, _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(function))


def inlined(function: Function) -> Function:
    """Compile a function that takes many arrays, which a call would copy."""
    decorate = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
    return cast(Function, decorate(function))


def entry(function: Function) -> Function:
    """Compile a function that Python calls, once per machine: the code is cached on disk.

    Numba looks only at the source of the function itself when it decides whether cached code
    is still valid, not at what the function calls. An entry therefore closes over
    `source_digest`, which becomes part of its key in the cache.

    Where no folder can be written (a read-only container), it is compiled at every start.
    """
    try:
        return cast(Function, _njit(cache=True)(function))
    except RuntimeError:  # "cannot cache function: no locator available"
        return cast(Function, _njit()(function))


def source_digest() -> int:
    """Return a number that changes whenever the source of any kernel does."""
    digest = hashlib.blake2b(digest_size=7)
    for name in _SOURCES:
        digest.update(pkgutil.get_data(__package__, f"numba_{name}.py") or b"")
    return int.from_bytes(digest.digest(), "little")


@inner
def magnitude_bits(x: Number) -> Number:
    """Return the bits of ``|x|``: ordered as unsigned integers like the magnitudes."""
    return float_bits(abs(x))


@inner
def keep_probability(twice_rank: Number, n: Number, density: Number, epsilon: Number) -> Number:
    """Return p of an element (DELLA paper, section 3.1), rounded once from float64 to float32."""
    position = (np.float64(twice_rank) * 0.5) / np.float64(n - 1)
    return np.float32((density - epsilon) + (2.0 * epsilon) * position)
