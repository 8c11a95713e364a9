"""Small things the Numba kernels share: the decorator, views of addresses, bits of numbers.

Kernels are serial and release the GIL: threads of our own call them on different blocks. No
``fastmath``: LLVM then contracts and reorders nothing, which equal bytes everywhere rest on.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numba
import numpy as np

from della_dist.ops.cpu.cache import KernelCache
from della_dist.ops.cpu.intrinsics import float_bits

if TYPE_CHECKING:
    from importlib.abc import Traversable

Function = TypeVar("Function", bound=Callable[..., Any])

#: Numba infers types; these say what the kernels' arguments are: contiguous arrays, scalars of
#: Numba or numpy, and tuples of either.
Array: TypeAlias = Any
Number: TypeAlias = Any
Pack: TypeAlias = Any

#: Codes of the dtypes, as the kernels take them.
DTYPE_CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
BF16, F16, F32, F64 = (np.int64(code) for code in range(4))


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
    kernel = _njit()(function)
    # "cannot cache function: no locator available"
    with contextlib.suppress(RuntimeError):
        kernel._cache = KernelCache(function)
    return cast(Function, kernel)


def source_digest(folder: Traversable = files("della_dist.ops")) -> int:  # noqa: B008
    """Return a number that changes with every file of Python below the folder of the mathematics.

    Which of them end up in machine code, as functions or as constants, nobody need know then.
    """
    digest = hashlib.blake2b(digest_size=7)
    for name, file in sorted(_python_files(folder)):
        digest.update(hashlib.blake2b(name.encode()).digest())
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return int.from_bytes(digest.digest(), "little")


def _python_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for file in folder.iterdir():
        name = prefix + file.name
        if file.is_dir():
            yield from _python_files(file, name + "/")
        elif file.name.endswith(".py"):
            yield name, file


@inner
def magnitude_bits(x: Number) -> Number:
    """Return the bits of ``|x|``: ordered as unsigned integers like the magnitudes."""
    return float_bits(abs(x))


@inner
def keep_probability(twice_rank: Number, n: Number, density: Number, epsilon: Number) -> Number:
    """Return p of an element (DELLA paper, section 3.1), rounded once from float64 to float32."""
    position = (np.float64(twice_rank) * 0.5) / np.float64(n - 1)
    return np.float32((density - epsilon) + (2.0 * epsilon) * position)
