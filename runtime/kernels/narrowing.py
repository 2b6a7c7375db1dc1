"""From wide lanes to bits and bytes: signs, roundings and saturated bytes.

AVX-512 packs several registers into one; elsewhere LLVM narrows them. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from runtime.kernels.integers import REGISTER, WORD, byte_type, emit_join, emit_slice
from runtime.kernels.targets import target_multiplies_bytes
from runtime.kernels.vectors import (
    Vector,
    _lanes_of,
    emit_call,
    emit_constant,
    intrinsic,
)

# A float32 below 2^22, plus this, is rounded half to even to a whole number that is in the low bits.
_ROUNDING = 1.5 * 2.0**23
ROUND_LIMIT = 2.0**22


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
        width = REGISTER
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
    parts = [emit_slice(builder, vector, first, REGISTER) for first in range(0, vector.type.count, REGISTER)]
    for name, bits in (("packssdw", 16), ("packsswb", 8)):
        if len(parts) > 1:
            result = ir.VectorType(ir.IntType(bits), 512 // bits)
            parts = [
                emit_call(builder, f"llvm.x86.avx512.{name}.512", result, [a, b])
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
    return parts[0]


@intrinsic
def round_words(typingctx: Any, vector: Any) -> Any:
    """float32 lanes below 2^22 as whole numbers, half to even."""
    result = Vector(types.int32, vector.lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if target_multiplies_bytes():
            every, current = ir.Constant(ir.IntType(16), -1), ir.Constant(WORD, 4)  # lanes; rounding mode
            operands = [args[0], ir.Constant(result.llvm, None), every, current]
            return emit_call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", result.llvm, operands)
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
        words = emit_join(builder, list(args))
        low, high = ir.Constant(words.type, None), ir.Constant(words.type, [255] * words.type.count)
        words = builder.select(builder.icmp_signed(">", words, low), words, low)
        words = builder.select(builder.icmp_signed("<", words, high), words, high)
        return builder.trunc(words, result.llvm)

    return result(a, b, c, d), codegen


def _pack_bytes(builder: Any, parts: Any) -> Any:
    """Two packs of 128 bits in turn, then their 32-bit pieces in order."""
    halves = ir.VectorType(ir.IntType(16), 32)
    pairs = [emit_call(builder, "llvm.x86.avx512.packssdw.512", halves, list(parts[i : i + 2])) for i in (0, 2)]
    packed = emit_call(builder, "llvm.x86.avx512.packuswb.512", byte_type(REGISTER), pairs)
    words = builder.bitcast(packed, ir.VectorType(WORD, REGISTER))
    order = [4 * lane + part for part in range(4) for lane in range(4)]
    return builder.bitcast(builder.shuffle_vector(words, words, emit_constant(REGISTER, order)), packed.type)


def _make_quarter(number: int) -> Callable[..., Any]:
    @intrinsic
    def quarter(typingctx: Any, vector: Any) -> Any:
        result = Vector(vector.element, vector.lanes // 4)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit_slice(builder, args[0], number * result.lanes, result.lanes)

        return result(vector), codegen

    return quarter


quarter0, quarter1, quarter2, quarter3 = (_make_quarter(number) for number in range(4))
