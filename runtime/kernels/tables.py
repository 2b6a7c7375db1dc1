"""Look-up of sixteen table entries at once.

The table is data and is looked up exactly. Where the processor permutes sixteen float32 lanes
across two registers (AVX-512), a table of up to 129 entries stays in registers; elsewhere each lane
is read from memory. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from runtime.kernels.targets import target_permutes
from runtime.kernels.vectors import Vector, emit_call, emit_constant, emit_pointer, emit_splat, intrinsic

_LANES = 16
_PERMUTE = "llvm.x86.avx512.vpermi2var.ps.512"


def _load_table(builder: Any, pointer: Any, index: int, lanes: int) -> Any:
    vector = ir.VectorType(ir.FloatType(), lanes)
    address = builder.gep(pointer, [ir.Constant(ir.IntType(64), index)])
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=4)


def _from_memory(builder: Any, pointer: Any, index: Any) -> Any:
    found = ir.Constant(ir.VectorType(ir.FloatType(), _LANES), ir.Undefined)
    for lane in range(_LANES):
        position = ir.Constant(ir.IntType(32), lane)
        entry = builder.zext(builder.extract_element(index, position), ir.IntType(64))
        found = builder.insert_element(found, builder.load(builder.gep(pointer, [entry])), position)
    return found


def _from_registers(builder: Any, pointer: Any, index: Any, entries: int) -> Any:
    """Looks up in ``entries`` (a power of two, at least 32) entries and the one after them."""
    vector = ir.VectorType(ir.FloatType(), _LANES)
    parts = []
    for begin in range(0, entries, 2 * _LANES):
        low = _load_table(builder, pointer, begin, _LANES)
        high = _load_table(builder, pointer, begin + _LANES, _LANES)
        parts.append(emit_call(builder, _PERMUTE, vector, [low, index, high]))
    bit = 2 * _LANES
    while len(parts) > 1:
        chosen = _has_bit(builder, index, bit)
        parts = [builder.select(chosen, high, low) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        bit *= 2
    last = emit_splat(builder, builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), entries)])), _LANES)
    return builder.select(_has_bit(builder, index, entries), last, parts[0])


def _has_bit(builder: Any, index: Any, bit: int) -> Any:
    masked = builder.and_(index, emit_constant(_LANES, [bit] * _LANES))
    return builder.icmp_unsigned("!=", masked, ir.Constant(masked.type, None))


@intrinsic
def lookup(typingctx: Any, table: Any, index: Any, width: Any) -> Any:
    """Sixteen entries of a table.

    Args:
        table: float32[32 W + 1], padded as ``runtime.operators.packing`` does.
        index: uint32 lanes, each at most 32 W.
        width: W zeros in a tuple, so that W is known when compiling, or any integer.
    """
    entries = 1 << (32 * width.count - 1).bit_length() if isinstance(width, types.UniTuple) else 0

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = context.get_constant(types.intp, 0)
        pointer = emit_pointer(context, builder, signature.args[0], args[0], zero, ir.FloatType())
        if entries and target_permutes():
            return _from_registers(builder, pointer, args[1], entries)
        return _from_memory(builder, pointer, args[1])

    return Vector(types.float32, _LANES)(table, index, width), codegen


@intrinsic
def word_count(typingctx: Any, width: Any) -> Any:
    """W, from W zeros in a tuple or from W itself."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(width, types.UniTuple):
            return context.get_constant(types.intp, width.count)
        return args[0]

    return types.intp(width), codegen
