"""Sums of squares, and of neighbouring lanes, exactly."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from runtime.kernels.integers import REGISTER, emit_neighbour_sums, emit_pair_sums
from runtime.kernels.vectors import Vector, emit_pointer, intrinsic


@intrinsic
def sum_of_squares(typingctx: Any, vector: Any) -> Any:
    """Squares of int16 lanes, added in pairs: int32 lanes."""
    result = Vector(types.int32, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_pair_sums(builder, args[0], args[0])

    return result(vector), codegen


@intrinsic
def neighbour_sums(typingctx: Any, vector: Any) -> Any:
    """Sums of two neighbouring lanes each: half as many lanes."""
    result = Vector(vector.element, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_neighbour_sums(builder, args[0])

    return result(vector), codegen


@intrinsic
def sums_of_eight(typingctx: Any, vector: Any) -> Any:
    """Sums of eight neighbouring lanes each."""
    result = Vector(vector.element, vector.lanes // 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[0]
        for _ in range(3):
            value = emit_neighbour_sums(builder, value)
        return value

    return result(vector), codegen


@intrinsic
def squares_of_sixteen(typingctx: Any, array: Any, index: Any, centre: Any, fours: Any) -> Any:
    """Sums of ``(array[index + i] - centre[i])^2`` over sixteen tiles that lie side by side.

    Args:
        array: uint8.
        index: first feature.
        centre: int16[64 F], which no kernel writes.
        fours: F zeros in a tuple, a power of two, for tiles of 4 F features; or none, which gives zeros.
    """
    result = Vector(types.int32, REGISTER)
    lanes = 4 * fours.count * REGISTER

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not lanes:
            return ir.Constant(result.llvm, None)
        wide = ir.VectorType(ir.IntType(16), lanes)
        place = emit_pointer(context, builder, signature.args[0], args[0], args[1], ir.VectorType(ir.IntType(8), lanes))
        zero = context.get_constant(types.intp, 0)
        middle = builder.load(emit_pointer(context, builder, signature.args[2], args[2], zero, wide), align=2)
        middle.set_metadata("invariant.load", builder.module.add_metadata([]))
        v = builder.sub(builder.zext(builder.load(place, align=1), wide), middle)
        value = emit_pair_sums(builder, v, v)
        while value.type.count > REGISTER:
            value = emit_neighbour_sums(builder, value)
        return value

    return result(array, types.intp, centre, fours), codegen
