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
_ROUNDING = 1.5 * 2.0**23
ROUND_LIMIT = 2.0**22


def _target_has(*needed: str) -> bool:
    """Whether the processor that Numba compiles for has some features."""
    chosen: str | None = vars(config).get("CPU_FEATURES")  # NUMBA_CPU_FEATURES, where the user sets it
    if chosen is not None:
        return {f"+{name}" for name in needed} <= set(chosen.split(","))
    host = llvm.get_host_cpu_features()
    return all(host.get(name, False) for name in needed)


def target_multiplies_bytes() -> bool:
    """Whether there is AVX-512 with packs (BW) and products of bytes (VNNI)."""
    return _target_has("avx512f", "avx512bw", "avx512vnni")


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
low_shorts = _make_cast(types.int16, lambda builder, value, target: builder.trunc(value, target))
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


@intrinsic
def broadcast16(typingctx: Any, array: Any, index: Any) -> Any:
    """Four bytes in each of sixteen lanes."""
    vector = Vector(types.int32, _REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(context, builder, signature, args, vector)

    return vector(array, types.intp), codegen


@intrinsic
def broadcast(typingctx: Any, array: Any, index: Any, block: Any) -> Any:
    """Four bytes in each lane; see ``load_constant`` for ``block``."""
    vector = Vector(types.int32, _REGISTER * block.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(context, builder, signature, args, vector)

    return vector(array, types.intp, block), codegen


def _broadcast(context: Any, builder: Any, signature: Any, args: Any, vector: Vector) -> Any:
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _WORD)
    return _splat(builder, builder.load(pointer, align=1), vector.lanes)


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
    return _neighbour_sums(builder, builder.mul(builder.sext(a, wide), builder.sext(b, wide)))


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


def _dot_saturating(builder: Any, total: Any, unsigned: Any, counts: Any) -> Any:
    """AVX2: products of bytes, added in pairs to 16 bits that saturate, then in pairs to 32."""
    parts = []
    half = _REGISTER // 2
    narrow, wide = ir.VectorType(ir.IntType(16), 2 * half), ir.VectorType(_WORD, half)
    ones = ir.Constant(narrow, [1] * narrow.count)
    for first in range(0, total.type.count, half):
        u, c = (builder.bitcast(_slice(builder, vector, first, half), _bytes(half)) for vector in (unsigned, counts))
        pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", narrow, [u, c])
        sums = _call(builder, "llvm.x86.avx2.pmadd.wd", wide, [pairs, ones])
        parts.append(builder.add(_slice(builder, total, first, half), sums))
    return _join(builder, parts)


@intrinsic
def dot_counts(typingctx: Any, total: Any, unsigned: Any, counts: Any) -> Any:
    """``dot_bytes`` for counts of 0..64, of which two products fit 16 bits."""
    vector = _lanes_of(total, unsigned, counts)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target_multiplies_bytes():
            return _dot_instruction(builder, *args)
        emit = _dot_saturating if _target_has("avx2") else _dot_everywhere
        return emit(builder, *args)

    return vector(total, unsigned, counts), codegen


@intrinsic
def sum_of_squares(typingctx: Any, vector: Any) -> Any:
    """Squares of int16 lanes, added in pairs: int32 lanes."""
    result = Vector(types.int32, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pair_sums(builder, args[0], args[0])

    return result(vector), codegen


def _neighbour_sums(builder: Any, value: Any) -> Any:
    """Sums of two neighbouring lanes each."""
    lanes = value.type.count
    even = builder.shuffle_vector(value, value, _constant(lanes // 2, range(0, lanes, 2)))
    odd = builder.shuffle_vector(value, value, _constant(lanes // 2, range(1, lanes, 2)))
    return builder.add(even, odd)


@intrinsic
def neighbour_sums(typingctx: Any, vector: Any) -> Any:
    """Sums of two neighbouring lanes each: half as many lanes."""
    result = Vector(vector.element, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _neighbour_sums(builder, args[0])

    return result(vector), codegen


@intrinsic
def sums_of_eight(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sums of eight neighbouring lanes each, of four vectors one after the other."""
    vector = _lanes_of(a, b, c, d)
    result = Vector(vector.element, vector.lanes // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _join(builder, list(args))
        for _ in range(3):
            value = _neighbour_sums(builder, value)
        return value

    return result(a, b, c, d), codegen


@intrinsic
def squares_of_sixteen(typingctx: Any, array: Any, index: Any, centre: Any, fours: Any) -> Any:
    """Sums of ``(array[index + i] - centre[i])^2`` over sixteen tiles that lie side by side.

    Args:
        array: uint8.
        index: first feature.
        centre: int16[64 F], which no kernel writes.
        fours: F zeros in a tuple, a power of two, for tiles of 4 F features; or none, which gives zeros.
    """
    result = Vector(types.int32, _REGISTER)
    lanes = 4 * fours.count * _REGISTER

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not lanes:
            return ir.Constant(result.llvm, None)
        wide = ir.VectorType(ir.IntType(16), lanes)
        place = _pointer(context, builder, signature.args[0], args[0], args[1], ir.VectorType(ir.IntType(8), lanes))
        zero = context.get_constant(types.intp, 0)
        middle = builder.load(_pointer(context, builder, signature.args[2], args[2], zero, wide), align=2)
        middle.set_metadata("invariant.load", builder.module.add_metadata([]))
        v = builder.sub(builder.zext(builder.load(place, align=1), wide), middle)
        value = _pair_sums(builder, v, v)
        while value.type.count > _REGISTER:
            value = _neighbour_sums(builder, value)
        return value

    return result(array, types.intp, centre, fours), codegen


@intrinsic
def load_four(typingctx: Any, array: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sixteen elements at each of four places."""
    vector = Vector(array.dtype, 4 * _REGISTER)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        part = ir.VectorType(vector.llvm.element, _REGISTER)
        pointers = [_pointer(context, builder, signature.args[0], args[0], place, part) for place in args[1:]]
        return _join(builder, [builder.load(pointer, align=1) for pointer in pointers])

    return vector(array, a, b, c, d), codegen


@intrinsic
def load_constant(typingctx: Any, array: Any, index: Any, block: Any) -> Any:
    """Loads lanes of an array that no kernel writes, so that LLVM may keep them across stores.

    Args:
        array: elements of 32 bits.
        index: element of lane 0.
        block: a zero for every sixteen lanes, in a tuple, so that their number is known when compiling.
    """
    vector = Vector(array.dtype, _REGISTER * block.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
        loaded = builder.load(pointer, align=vector.align)
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    return vector(array, types.intp, block), codegen


@intrinsic
def negative_bits(typingctx: Any, vector: Any) -> Any:
    """Bit i of the result is 1 where lane ``sign_order(lanes)[i]`` is negative."""
    result: Any = {16: types.uint16, 32: types.uint32, 64: types.uint64}[vector.lanes]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        packed = _pack_signs(builder, args[0]) if target_multiplies_bytes() else args[0]
        mask = builder.icmp_signed("<", packed, ir.Constant(packed.type, None))
        return builder.bitcast(mask, ir.IntType(vector.lanes))

    return result(vector), codegen


def sign_order(lanes: int) -> list[int]:
    """The lane whose sign is bit i of ``negative_bits``: packing is cheapest in the order of the processor."""
    order = list(range(lanes))
    if target_multiplies_bytes():
        width = _REGISTER
        while width < lanes:  # two registers become one of half as wide lanes, 128 bits of each in turn
            part = width // 4
            pairs = [order[i : i + 2 * width] for i in range(0, lanes, 2 * width)]
            order = [
                pair[half * width + quarter * part + i]
                for pair in pairs
                for quarter in range(4)
                for half in range(2)
                for i in range(part)
            ]
            width *= 2
    return order


def _pack_signs(builder: Any, vector: Any) -> Any:
    """Saturates 16, 32 or 64 lanes until they fit one register."""
    parts = [_slice(builder, vector, first, _REGISTER) for first in range(0, vector.type.count, _REGISTER)]
    for name, bits in (("packssdw", 16), ("packsswb", 8)):
        if len(parts) > 1:
            result = ir.VectorType(ir.IntType(bits), 512 // bits)
            parts = [
                _call(builder, f"llvm.x86.avx512.{name}.512", result, [a, b])
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
    return parts[0]


@intrinsic
def round_words(typingctx: Any, vector: Any) -> Any:
    """float32 lanes below 2^22 as whole numbers, half to even."""
    result = Vector(types.int32, vector.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target_multiplies_bytes():
            every, current = ir.Constant(ir.IntType(16), -1), ir.Constant(_WORD, 4)  # lanes; rounding mode
            operands = [args[0], ir.Constant(result.llvm, None), every, current]
            return _call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", result.llvm, operands)
        shift = ir.Constant(vector.llvm, [ir.Constant(ir.FloatType(), _ROUNDING)] * vector.lanes)
        bits = [builder.bitcast(value, result.llvm) for value in (builder.fadd(args[0], shift), shift)]
        return builder.sub(*bits)

    return result(vector), codegen


@intrinsic
def saturate_bytes(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four times sixteen int32 as 64 bytes in that order: what lies below 0 as 0, above 255 as 255."""
    vector = _lanes_of(a, b, c, d)
    result = Vector(types.uint8, 4 * vector.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target_multiplies_bytes():
            return _pack_bytes(builder, args)
        words = _join(builder, list(args))
        low, high = ir.Constant(words.type, None), ir.Constant(words.type, [255] * words.type.count)
        words = builder.select(builder.icmp_signed(">", words, low), words, low)
        words = builder.select(builder.icmp_signed("<", words, high), words, high)
        return builder.trunc(words, result.llvm)

    return result(a, b, c, d), codegen


def _pack_bytes(builder: Any, parts: Any) -> Any:
    """Two packs of 128 bits in turn, then their 32-bit pieces in order."""
    halves = ir.VectorType(ir.IntType(16), 32)
    pairs = [_call(builder, "llvm.x86.avx512.packssdw.512", halves, list(parts[i : i + 2])) for i in (0, 2)]
    packed = _call(builder, "llvm.x86.avx512.packuswb.512", _bytes(_REGISTER), pairs)
    words = builder.bitcast(packed, ir.VectorType(_WORD, _REGISTER))
    order = [4 * lane + part for part in range(4) for lane in range(4)]
    return builder.bitcast(builder.shuffle_vector(words, words, _constant(_REGISTER, order)), packed.type)


def _make_quarter(number: int) -> Callable[..., Any]:
    @intrinsic
    def quarter(typingctx: Any, vector: Any) -> Any:
        result = Vector(vector.element, vector.lanes // 4)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _slice(builder, args[0], number * result.lanes, result.lanes)

        return result(vector), codegen

    return quarter


quarter0, quarter1, quarter2, quarter3 = (_make_quarter(number) for number in range(4))


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
