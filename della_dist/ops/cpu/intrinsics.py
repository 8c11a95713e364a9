# mypy: disable-error-code="import-untyped,no-untyped-call"
"""Operations that Numba lacks, written as the LLVM instructions they are.

Each function is run while a kernel is compiled: it takes Numba types and returns the signature of
the operation and a function that emits its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.np.arrayobj import populate_array

#: Numba and llvmlite have no type annotations. These say what is meant: a Numba type, an LLVM
#: value, and a signature with its code generator.
Type: TypeAlias = Any
Value: TypeAlias = Any
Intrinsic: TypeAlias = Any


def intrinsic(function: Callable[..., Intrinsic]) -> Callable[..., Any]:
    """Make `function` an operation that kernels can use."""
    return cast(Callable[..., Any], extending.intrinsic(function))


@intrinsic
def wide_vectors(typingctx: Type) -> Intrinsic:
    """Let the calling function use vectors of 512 bits where the processor has them.

    LLVM prefers 256 bits on many of those, out of care for code that seldom uses vectors.
    """

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        # `FunctionAttributes.add` knows only attributes without a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def float_bits(typingctx: Type, x: Type) -> Intrinsic:
    """Return the bits of a float32 as uint32, of a float64 as uint64."""
    result = types.uint32 if x == types.float32 else types.uint64

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return result(x), codegen


@intrinsic
def bits_float(typingctx: Type, x: Type) -> Intrinsic:
    """Return the float32 with the bits of a uint32, the float64 with those of a uint64."""
    result = types.float32 if x == types.uint32 else types.float64

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return result(x), codegen


@intrinsic
def like(typingctx: Type, reference: Type, x: Type) -> Intrinsic:
    """Return the number `x` converted to the type of `reference`."""

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    return reference(reference, x), codegen


@intrinsic
def shifted(typingctx: Type, x: Type, amount: Type) -> Intrinsic:
    """Return ``x >> amount`` in the type of the unsigned `x`; `amount` is below its width.

    Numba's own operator works in 64 bits.
    """

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        return builder.lshr(args[0], context.cast(builder, args[1], signature.args[1], x))

    return x(x, amount), codegen


@intrinsic
def trailing_zeros(typingctx: Type, x: Type) -> Intrinsic:
    """Return the number of trailing zero bits of an integer; its width where it is 0."""

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        count = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return context.cast(builder, count, signature.args[0], signature.return_type)

    return types.uint64(x), codegen


@intrinsic
def bit_length(typingctx: Type, x: Type) -> Intrinsic:
    """Return the number of bits needed to write an unsigned integer; 0 where it is 0."""

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        count = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))
        width = ir.Constant(args[0].type, args[0].type.width)
        return context.cast(
            builder, builder.sub(width, count), signature.args[0], signature.return_type
        )

    return types.uint64(x), codegen


@intrinsic
def population_count(typingctx: Type, x: Type) -> Intrinsic:
    """Return the number of one bits of a uint64."""

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def nonzero_mask(typingctx: Type, array: Type, start: Type, bits: Type) -> Intrinsic:
    """Return a uint64 whose bit j tells whether ``array[start + j] & bits`` is not zero: 64 j.

    One vector comparison: LLVM does not find it in a loop.
    """

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
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


@intrinsic
def add_products(typingctx: Type, array: Type, other: Type, sums: Type) -> Intrinsic:
    """Add the products of two arrays' numbers, whole groups of 16 only, to 16 float64 `sums`.

    Each sum takes every 16th product, in order. LLVM may not split a sum by itself, since that
    changes the result.
    """

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        element = context.get_value_type(signature.args[0].dtype)
        struct = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0])
        second = cgutils.create_struct_proxy(signature.args[1])(context, builder, args[1])
        data = cgutils.create_struct_proxy(signature.args[2])(context, builder, args[2]).data
        double, int64 = ir.DoubleType(), ir.IntType(64)
        lanes, vector = ir.VectorType(double, 16), ir.VectorType(element, 16)
        stored = builder.bitcast(data, lanes.as_pointer())
        total = cgutils.alloca_once_value(builder, builder.load(stored, align=8))
        groups = builder.lshr(struct.nitems, ir.Constant(int64, 4))
        with cgutils.for_range(builder, groups, intp=int64) as loop:
            place = builder.shl(loop.index, ir.Constant(int64, 4))
            factors = []
            for start in (struct.data, second.data):
                values = builder.load(
                    builder.bitcast(builder.gep(start, [place]), vector.as_pointer()),
                    align=8 if element == double else 4,
                )
                factors.append(values if element == double else builder.fpext(values, lanes))
            product = builder.fmul(*factors)
            builder.store(builder.fadd(builder.load(total), product), total)
        builder.store(builder.load(total), stored, align=8)
        return context.get_dummy_value()

    return types.void(array, other, sums), codegen


#: Rows and columns of the tile of `add_tile`: its sums stay in the registers of vectors.
TILE_ROWS, TILE_COLS = 4, 16


@intrinsic
def add_tile(typingctx: Type, left: Type, right: Type, tile: Type) -> Intrinsic:
    """Add ``left.T @ right`` to a tile: (K, 4), (K, 16) and (4, 16) float64, flat and contiguous.

    Every sum takes its products one by one, in the order of the rows, each rounded by itself: LLVM
    would not keep so many sums in registers on its own.
    """

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        a, b, c = (
            cgutils.create_struct_proxy(kind)(context, builder, value)
            for kind, value in zip(signature.args, args, strict=True)
        )
        double, int32, int64 = ir.DoubleType(), ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(double, 8)
        lane_zero = ir.Constant(ir.VectorType(int32, 8), [0] * 8)
        undefined = ir.Constant(vector, ir.Undefined)

        def place(data: Value, number: Value) -> Value:
            return builder.bitcast(builder.gep(data, [number]), vector.as_pointer())

        def vectors(data: Value, first: Value) -> list[Value]:
            ats = [builder.add(first, ir.Constant(int64, at)) for at in range(0, TILE_COLS, 8)]
            return [builder.load(place(data, at), align=8) for at in ats]

        rows = range(TILE_ROWS)
        starts = [ir.Constant(int64, row * TILE_COLS) for row in rows]
        begun = [vectors(c.data, start) for start in starts]
        sums = [[cgutils.alloca_once_value(builder, v) for v in row] for row in begun]
        count = builder.lshr(a.nitems, ir.Constant(int64, 2))
        with cgutils.for_range(builder, count, intp=int64) as loop:
            factors = vectors(b.data, builder.mul(loop.index, ir.Constant(int64, TILE_COLS)))
            first = builder.mul(loop.index, ir.Constant(int64, TILE_ROWS))
            for row in rows:
                at = builder.gep(a.data, [builder.add(first, ir.Constant(int64, row))])
                one = builder.insert_element(undefined, builder.load(at), ir.Constant(int32, 0))
                every = builder.shuffle_vector(one, undefined, lane_zero)
                for total, factor in zip(sums[row], factors, strict=True):
                    product = builder.fmul(every, factor)
                    builder.store(builder.fadd(builder.load(total), product), total)
        for row in rows:
            for half, total in enumerate(sums[row]):
                at = ir.Constant(int64, row * TILE_COLS + 8 * half)
                builder.store(builder.load(total), place(c.data, at), align=8)
        return context.get_dummy_value()

    return types.void(left, right, tile), codegen


@intrinsic
def array_at(typingctx: Type, address: Type, start: Type, n: Type, reference: Type) -> Intrinsic:
    """Return `n` numbers of `reference`'s type, from number `start` of those at `address`."""
    array = types.Array(reference, 1, "C")

    def codegen(context: Value, builder: Value, signature: Value, args: Value) -> Value:
        element = context.get_value_type(reference)
        pointer = builder.inttoptr(args[0], element.as_pointer())
        size = ir.Constant(args[2].type, reference.bitwidth // 8)
        result = context.make_array(array)(context, builder)
        populate_array(
            result,
            data=builder.gep(pointer, [args[1]]),
            shape=cgutils.pack_array(builder, [args[2]]),
            strides=cgutils.pack_array(builder, [size]),
            itemsize=size,
            meminfo=None,
        )
        return result._getvalue()

    return array(types.uint64, types.int64, types.int64, reference), codegen
