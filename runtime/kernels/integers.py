"""Whole numbers in vectors: lanes of int32, each a sum or four bytes, which are counted and multiplied.

The product of four unsigned bytes with four signed ones is one instruction with AVX-512 VNNI, and
widening multiply-adds that LLVM chooses elsewhere. Both are exact, so every processor gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from runtime.kernels.targets import target_has, target_multiplies_bytes
from runtime.kernels.vectors import (
    Vector,
    _lanes_of,
    _make_binary,
    _make_cast,
    emit_call,
    emit_constant,
    emit_pointer,
    emit_splat,
    intrinsic,
)

_DOT = "llvm.x86.avx512.vpdpbusd.512"
REGISTER = 16  # 32-bit lanes of a 512-bit register
WORD = ir.IntType(32)


def byte_type(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(8), 4 * lanes)


def _as_bytes(emit: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on the bytes of lanes."""

    def emit_on_bytes(builder: Any, *vectors: Any) -> Any:
        parts = [builder.bitcast(vector, byte_type(vector.type.count)) for vector in vectors]
        return builder.bitcast(emit(builder, *parts), vectors[0].type)

    return emit_on_bytes


and_words = _make_binary(lambda builder, a, b: builder.and_(a, b))
add_bytes = _make_binary(_as_bytes(lambda builder, a, b: builder.add(a, b)))
subtract_words = _make_binary(lambda builder, a, b: builder.sub(a, b))
multiply_words = _make_binary(lambda builder, a, b: builder.mul(a, b))
to_float32 = _make_cast(types.float32, lambda builder, value, target: builder.sitofp(value, target))
to_float64 = _make_cast(types.float64, lambda builder, value, target: builder.sitofp(value, target))
truncate = _make_cast(types.int32, lambda builder, value, target: builder.fptosi(value, target))
low_bytes = _make_cast(types.uint8, lambda builder, value, target: builder.trunc(value, target))
low_shorts = _make_cast(types.int16, lambda builder, value, target: builder.trunc(value, target))
widen_bytes = _make_cast(types.int16, lambda builder, value, target: builder.zext(value, target))


@intrinsic
def square_root(typingctx: Any, vector: Any) -> Any:
    """Square root of each lane, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, f"llvm.sqrt.v{vector.lanes}f64", vector.llvm, [args[0]])

    return vector(vector), codegen


@intrinsic
def popcount_bytes(typingctx: Any, vector: Any) -> Any:
    """Set bits of each byte of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = 4 * vector.lanes
        parts = builder.bitcast(args[0], byte_type(vector.lanes))
        return builder.bitcast(emit_call(builder, f"llvm.ctpop.v{size}i8", parts.type, [parts]), vector.llvm)

    return vector(vector), codegen


@intrinsic
def zeros16(typingctx: Any) -> Any:
    """Sixteen zeros of int32."""
    vector = Vector(types.int32, REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(vector.llvm, None)

    return vector(), codegen


@intrinsic
def broadcast16(typingctx: Any, array: Any, index: Any) -> Any:
    """Four bytes in each of sixteen lanes."""
    vector = Vector(types.int32, REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(context, builder, signature, args, vector)

    return vector(array, types.intp), codegen


@intrinsic
def broadcast(typingctx: Any, array: Any, index: Any, block: Any) -> Any:
    """Four bytes in each lane; see ``load_constant`` for ``block``."""
    vector = Vector(types.int32, REGISTER * block.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(context, builder, signature, args, vector)

    return vector(array, types.intp, block), codegen


def _broadcast(context: Any, builder: Any, signature: Any, args: Any, vector: Vector) -> Any:
    pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], WORD)
    return emit_splat(builder, builder.load(pointer, align=1), vector.lanes)


@intrinsic
def load_four(typingctx: Any, array: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sixteen elements at each of four places."""
    vector = Vector(array.dtype, 4 * REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        part = ir.VectorType(vector.llvm.element, REGISTER)
        pointers = [emit_pointer(context, builder, signature.args[0], args[0], place, part) for place in args[1:]]
        return emit_join(builder, [builder.load(pointer, align=1) for pointer in pointers])

    return vector(array, a, b, c, d), codegen


@intrinsic
def load_constant(typingctx: Any, array: Any, index: Any, block: Any) -> Any:
    """Loads lanes of an array that no kernel writes, so that LLVM may keep them across stores.

    Args:
        array: elements of 32 bits.
        index: element of lane 0.
        block: a zero for every sixteen lanes, in a tuple, so that their number is known when compiling.
    """
    vector = Vector(array.dtype, REGISTER * block.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
        loaded = builder.load(pointer, align=vector.align)
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    return vector(array, types.intp, block), codegen


def emit_slice(builder: Any, vector: Any, first: int, lanes: int) -> Any:
    return builder.shuffle_vector(vector, vector, emit_constant(lanes, range(first, first + lanes)))


def emit_join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        lanes = parts[0].type.count
        order = emit_constant(2 * lanes, range(2 * lanes))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def emit_neighbour_sums(builder: Any, value: Any) -> Any:
    """Sums of two neighbouring lanes each."""
    lanes = value.type.count
    even = builder.shuffle_vector(value, value, emit_constant(lanes // 2, range(0, lanes, 2)))
    odd = builder.shuffle_vector(value, value, emit_constant(lanes // 2, range(1, lanes, 2)))
    return builder.add(even, odd)


def emit_pair_sums(builder: Any, a: Any, b: Any) -> Any:
    """``a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]`` in 32 bits, of signed 16-bit lanes."""
    lanes = a.type.count
    wide = ir.VectorType(WORD, lanes)
    return emit_neighbour_sums(builder, builder.mul(builder.sext(a, wide), builder.sext(b, wide)))


def _dot_instruction(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    parts = []
    for first in range(0, total.type.count, REGISTER):
        operands = [emit_slice(builder, vector, first, REGISTER) for vector in (total, unsigned, signed)]
        parts.append(emit_call(builder, _DOT, operands[0].type, operands))
    return emit_join(builder, parts)


def _dot_everywhere(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Even and odd bytes as 16-bit lanes, multiplied and added in pairs."""
    lanes = 2 * total.type.count
    halves = ir.VectorType(ir.IntType(16), lanes)
    eight = ir.Constant(halves, [8] * lanes)
    u, s = builder.bitcast(unsigned, halves), builder.bitcast(signed, halves)
    low = builder.and_(u, ir.Constant(halves, [255] * lanes))
    even = emit_pair_sums(builder, low, builder.ashr(builder.shl(s, eight), eight))
    odd = emit_pair_sums(builder, builder.lshr(u, eight), builder.ashr(s, eight))
    return builder.add(total, builder.add(even, odd))


@intrinsic
def dot_bytes(typingctx: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """``total + sum u s`` over the four bytes of each lane, u unsigned and s signed."""
    vector = _lanes_of(total, unsigned, signed)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _dot_instruction if target_multiplies_bytes() else _dot_everywhere
        return emit(builder, *args)

    return vector(total, unsigned, signed), codegen


def _dot_saturating(builder: Any, total: Any, unsigned: Any, counts: Any) -> Any:
    """AVX2: products of bytes, added in pairs to 16 bits that saturate, then in pairs to 32."""
    parts = []
    half = REGISTER // 2
    narrow, wide = ir.VectorType(ir.IntType(16), 2 * half), ir.VectorType(WORD, half)
    ones = ir.Constant(narrow, [1] * narrow.count)
    for first in range(0, total.type.count, half):
        u, c = (
            builder.bitcast(emit_slice(builder, vector, first, half), byte_type(half)) for vector in (unsigned, counts)
        )
        pairs = emit_call(builder, "llvm.x86.avx2.pmadd.ub.sw", narrow, [u, c])
        sums = emit_call(builder, "llvm.x86.avx2.pmadd.wd", wide, [pairs, ones])
        parts.append(builder.add(emit_slice(builder, total, first, half), sums))
    return emit_join(builder, parts)


@intrinsic
def dot_counts(typingctx: Any, total: Any, unsigned: Any, counts: Any) -> Any:
    """``dot_bytes`` for counts of 0..64, of which two products fit 16 bits."""
    vector = _lanes_of(total, unsigned, counts)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target_multiplies_bytes():
            return _dot_instruction(builder, *args)
        emit = _dot_saturating if target_has("avx2") else _dot_everywhere
        return emit(builder, *args)

    return vector(total, unsigned, counts), codegen


@intrinsic
def store_apart(typingctx: Any, array: Any, index: Any, step: Any, vector: Any, count: Any) -> Any:
    """Writes lane i to ``array[index + i * step]`` for i below ``count``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        position, stop = args[1], args[4]
        for lane in range(vector.lanes):
            number = ir.Constant(stop.type, lane)
            with builder.if_then(builder.icmp_signed("<", number, stop), likely=True):
                at = builder.add(position, builder.mul(args[2], number))
                pointer = emit_pointer(context, builder, signature.args[0], args[0], at, vector.llvm.element)
                builder.store(builder.extract_element(args[3], ir.Constant(WORD, lane)), pointer, align=1)

    return types.void(array, types.intp, types.intp, vector, types.intp), codegen


def _make_store_parts(width: int) -> Callable[..., Any]:
    part = ir.IntType(width)

    @intrinsic
    def store_parts(typingctx: Any, array: Any, index: Any, step: Any, bits: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, position, apart, number, stop = args
            for i in range(number.type.width // width):
                order = ir.Constant(stop.type, i)
                with builder.if_then(builder.icmp_signed("<", order, stop), likely=True):
                    at = builder.add(position, builder.mul(apart, order))
                    pointer = emit_pointer(context, builder, signature.args[0], args[0], at, part)
                    # By shifts: an extract from lanes would go by way of the stack.
                    value = builder.lshr(number, ir.Constant(number.type, i * width))
                    value = builder.trunc(value, part) if width < number.type.width else value
                    builder.store(value, pointer, align=1)

        return types.void(array, types.intp, types.intp, bits, types.intp), codegen

    return store_parts


# Write the first ``count`` bytes, or pairs of bytes, of an unsigned number, one every ``step`` elements.
store_bytes_apart = _make_store_parts(8)
store_shorts_apart = _make_store_parts(16)
