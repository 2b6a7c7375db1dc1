"""Whole numbers in vectors: bytes four to a 32-bit lane, counted, multiplied and summed exactly.

A lane of int32 holds one sum, or four bytes that belong to it. The product of four unsigned bytes
with four signed ones is one instruction with AVX-512 VNNI, and widening multiply-adds that LLVM
chooses elsewhere. Both are exact, so every processor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import config, types

from runtime.kernels.vectors import (
    Vector,
    _call,
    _constant,
    _lanes_of,
    _make_binary,
    _make_cast,
    _pointer,
    _splat,
    intrinsic,
)

_DOT = "llvm.x86.avx512.vpdpbusd.512"
_REGISTER = 16  # 32-bit lanes of a 512-bit register
_WORD = ir.IntType(32)
# A float32 below 2^22, plus this, is rounded half to even to a whole number that is in the low bits.
ROUNDING = 1.5 * 2.0**23


def target_multiplies_bytes() -> bool:
    """Whether the processor that Numba compiles for has AVX-512 VNNI."""
    chosen: str | None = vars(config).get("CPU_FEATURES")  # NUMBA_CPU_FEATURES, where the user sets it
    if chosen is not None:
        return {"+avx512f", "+avx512vnni"} <= set(chosen.split(","))
    return bool(llvm.get_host_cpu_features().get("avx512vnni", False))


def _bytes(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(8), 4 * lanes)


def _as_bytes(emit: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on the bytes of lanes."""

    def emit_on_bytes(builder: Any, *vectors: Any) -> Any:
        parts = [builder.bitcast(vector, _bytes(vector.type.count)) for vector in vectors]
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
widen_bytes = _make_cast(types.int16, lambda builder, value, target: builder.zext(value, target))


@intrinsic
def square_root(typingctx: Any, vector: Any) -> Any:
    """Square root of each lane, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, f"llvm.sqrt.v{vector.lanes}f64", vector.llvm, [args[0]])

    return vector(vector), codegen


@intrinsic
def popcount_bytes(typingctx: Any, vector: Any) -> Any:
    """Set bits of each byte of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = 4 * vector.lanes
        parts = builder.bitcast(args[0], _bytes(vector.lanes))
        return builder.bitcast(_call(builder, f"llvm.ctpop.v{size}i8", parts.type, [parts]), vector.llvm)

    return vector(vector), codegen


@intrinsic
def zeros16(typingctx: Any) -> Any:
    """Sixteen zeros of int32."""
    vector = Vector(types.int32, _REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(vector.llvm, None)

    return vector(), codegen


def _make_broadcast(lanes: int) -> Callable[..., Any]:
    @intrinsic
    def broadcast(typingctx: Any, array: Any, index: Any) -> Any:
        vector = Vector(types.int32, lanes)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _WORD)
            return _splat(builder, builder.load(pointer, align=1), lanes)

        return vector(array, types.intp), codegen

    return broadcast


broadcast16 = _make_broadcast(16)
broadcast32 = _make_broadcast(32)
broadcast64 = _make_broadcast(64)


def _slice(builder: Any, vector: Any, first: int, lanes: int) -> Any:
    return builder.shuffle_vector(vector, vector, _constant(lanes, range(first, first + lanes)))


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        lanes = parts[0].type.count
        order = _constant(2 * lanes, range(2 * lanes))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot_instruction(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    parts = []
    for first in range(0, total.type.count, _REGISTER):
        operands = [_slice(builder, vector, first, _REGISTER) for vector in (total, unsigned, signed)]
        parts.append(_call(builder, _DOT, operands[0].type, operands))
    return _join(builder, parts)


def _pair_sums(builder: Any, a: Any, b: Any) -> Any:
    """``a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]`` in 32 bits, of signed 16-bit lanes."""
    lanes = a.type.count
    wide = ir.VectorType(_WORD, lanes)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even = builder.shuffle_vector(product, product, _constant(lanes // 2, range(0, lanes, 2)))
    odd = builder.shuffle_vector(product, product, _constant(lanes // 2, range(1, lanes, 2)))
    return builder.add(even, odd)


def _dot_everywhere(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Even and odd bytes as 16-bit lanes, multiplied and added in pairs."""
    lanes = 2 * total.type.count
    halves = ir.VectorType(ir.IntType(16), lanes)
    eight = ir.Constant(halves, [8] * lanes)
    u, s = builder.bitcast(unsigned, halves), builder.bitcast(signed, halves)
    low = builder.and_(u, ir.Constant(halves, [255] * lanes))
    even = _pair_sums(builder, low, builder.ashr(builder.shl(s, eight), eight))
    odd = _pair_sums(builder, builder.lshr(u, eight), builder.ashr(s, eight))
    return builder.add(total, builder.add(even, odd))


@intrinsic
def dot_bytes(typingctx: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """``total + sum u s`` over the four bytes of each lane, u unsigned and s signed."""
    vector = _lanes_of(total, unsigned, signed)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _dot_instruction if target_multiplies_bytes() else _dot_everywhere
        return emit(builder, *args)

    return vector(total, unsigned, signed), codegen


@intrinsic
def sum_of_squares(typingctx: Any, vector: Any) -> Any:
    """Squares of sixteen int16, added in pairs: int32 lanes."""
    result = Vector(types.int32, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pair_sums(builder, args[0], args[0])

    return result(vector), codegen


@intrinsic
def sum_words(typingctx: Any, vector: Any) -> Any:
    """Sum of all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, f"llvm.vector.reduce.add.v{vector.lanes}i32", _WORD, [args[0]])

    return vector.element(vector), codegen


@intrinsic
def nonnegative_bits(typingctx: Any, vector: Any) -> Any:
    """Bit i of the result is 1 where lane i is ``>= 0``."""
    result: Any = {16: types.uint16, 32: types.uint32, 64: types.uint64}[vector.lanes]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.icmp_signed(">=", args[0], ir.Constant(vector.llvm, None))
        return builder.bitcast(mask, ir.IntType(vector.lanes))

    return result(vector), codegen


@intrinsic
def float_bits(typingctx: Any, vector: Any) -> Any:
    """The bits of float32 lanes."""
    result = Vector(types.int32, vector.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], result.llvm)

    return result(vector), codegen


@intrinsic
def store_apart(typingctx: Any, array: Any, index: Any, step: Any, vector: Any, count: Any) -> Any:
    """Writes lane i to ``array[index + i * step]`` for i below ``count``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        position, stop = args[1], args[4]
        for lane in range(vector.lanes):
            number = ir.Constant(stop.type, lane)
            with builder.if_then(builder.icmp_signed("<", number, stop), likely=True):
                at = builder.add(position, builder.mul(args[2], number))
                pointer = _pointer(context, builder, signature.args[0], args[0], at, vector.llvm.element)
                builder.store(builder.extract_element(args[3], ir.Constant(_WORD, lane)), pointer)

    return types.void(array, types.intp, types.intp, vector, types.intp), codegen
