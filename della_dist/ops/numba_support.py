"""Small things the Numba kernels share: the decorator, views of addresses, bits of numbers.

Kernels are serial and release the GIL: threads of our own call them on different blocks. No
``fastmath``: LLVM then contracts and reorders nothing, which equal bytes everywhere rest on.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

#: Codes of the dtypes, as the kernels take them.
DTYPE_CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
BF16, F16, F32, F64 = (np.int64(code) for code in range(4))

#: Modules whose code ends up in the cached kernels.
_SOURCES = ("support", "philox", "convert", "rank", "sort", "band", "merge", "measure")


def inner(function: Function) -> Function:
    """Compile a function that kernels call: typed Python, not cached by itself."""
    return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))


def entry(function: Function) -> Function:
    """Compile a function that Python calls, once per machine: the code is cached on disk.

    Numba looks only at the source of the function itself when it decides whether cached code
    is still valid, not at what the function calls. An entry therefore closes over
    `source_digest`, which becomes part of its key in the cache.
    """
    return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))


def source_digest() -> int:
    """Return a number that changes whenever the source of any kernel does."""
    digest = hashlib.blake2b(digest_size=7)
    for name in _SOURCES:
        digest.update(pkgutil.get_data(__package__, f"numba_{name}.py") or b"")
    return int.from_bytes(digest.digest(), "little")


@intrinsic  # type: ignore[untyped-decorator]
def float_bits(typingctx: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the bits of a float32 as uint32, of a float64 as uint64."""
    result = types.uint32 if x == types.float32 else types.uint64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return result(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_float(typingctx: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the float32 with the bits of a uint32, the float64 with those of a uint64."""
    result = types.float32 if x == types.uint32 else types.float64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return result(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def like(typingctx: Any, reference: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the number `x` converted to the type of `reference`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    return reference(reference, x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def trailing_zeros(typingctx: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the number of trailing zero bits of an integer; its width where it is 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return context.cast(builder, count, signature.args[0], signature.return_type)

    return types.uint64(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bit_length(typingctx: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the number of bits needed to write an unsigned integer; 0 where it is 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))
        width = ir.Constant(args[0].type, args[0].type.width)
        return context.cast(
            builder, builder.sub(width, count), signature.args[0], signature.return_type
        )

    return types.uint64(x), codegen


@intrinsic  # type: ignore[untyped-decorator]
def population_count(typingctx: Any, x: Any) -> Any:  # noqa: ARG001
    """Return the number of one bits of a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def nonzero_mask(typingctx: Any, array: Any, start: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return a uint64 whose bit j tells whether ``array[start + j] & bits`` is not zero: 64 j.

    One vector comparison: LLVM does not find it in a loop.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_value_type(signature.args[0].dtype)
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(element, 64)
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        values = builder.load(place, align=element.width // 8)
        undefined = ir.Constant(vector, ir.Undefined)
        every = builder.insert_element(undefined, args[2], ir.Constant(ir.IntType(32), 0))
        lane_zero = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
        every = builder.shuffle_vector(every, undefined, lane_zero)
        zero = ir.Constant(vector, None)
        return builder.bitcast(
            builder.icmp_unsigned("!=", builder.and_(values, every), zero), ir.IntType(64)
        )

    return types.uint64(array, types.uint64, array.dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typingctx: Any, address: Any, start: Any, reference: Any) -> Any:  # noqa: ARG001
    """Return a pointer to number `start` of those of `reference`'s type that lie at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_value_type(signature.return_type))
        return builder.gep(pointer, [args[1]])

    return types.CPointer(reference)(types.uint64, types.int64, reference), codegen


@inner
def array_at(address: Any, start: Any, n: Any, reference: Any) -> Any:
    """Return `n` numbers of `reference`'s type, from number `start` of those at `address`."""
    return numba.carray(_pointer(address, start, reference), (n,))


@inner
def magnitude_bits(x: Any) -> Any:
    """Return the bits of ``|x|``: ordered as unsigned integers like the magnitudes."""
    return float_bits(abs(x))


@inner
def keep_probability(twice_rank: Any, n: Any, density: Any, epsilon: Any) -> Any:
    """Return p of an element (DELLA paper, section 3.1), rounded once from float64 to float32."""
    position = (np.float64(twice_rank) * 0.5) / np.float64(n - 1)
    return np.float32((density - epsilon) + (2.0 * epsilon) * position)
