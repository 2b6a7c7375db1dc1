"""Vectors of fixed width as values inside Numba functions.

Numba has no vector type, and LLVM's loop vectoriser stops at half of a 512-bit register and knows
neither table look-up in registers nor packing of comparison bits. The intrinsics here emit LLVM's
own vector operations. LLVM legalises every width on every processor, so a kernel written with them
computes the same bits on AVX-512, AVX2 and NEON; only its speed differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models, register_default
from numba.core.errors import TypingError
from numba.extending import intrinsic as _numba_intrinsic

_ELEMENTS: dict[Any, Any] = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint32: ir.IntType(32),
    types.int32: ir.IntType(32),
    types.int16: ir.IntType(16),
    types.uint8: ir.IntType(8),
}
_SUFFIXES: dict[Any, str] = {
    types.float32: "f32",
    types.float64: "f64",
    types.uint32: "i32",
    types.int32: "i32",
    types.int16: "i16",
    types.uint8: "i8",
}
# Numba's annotations describe the typing function, not the calls of what it makes.
intrinsic: Any = _numba_intrinsic


class Vector(types.Type):
    """Numba type of a vector.

    Attributes:
        element: Numba type of one lane, a float or an integer.
        lanes: number of lanes.
    """

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element} x {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        """LLVM's type."""
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)

    @property
    def align(self) -> int:
        """Bytes on which loads and stores rely: an element's own; nothing asks for more."""
        return min(_bytes_of(self.element), 4)


def _bytes_of(element: Any) -> int:
    return int(element.bitwidth) // 8


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    """Stores a vector as LLVM's own."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _lanes_of(*vectors: types.Type) -> Vector:
    first = vectors[0]
    if not isinstance(first, Vector) or any(vector != first for vector in vectors):
        raise TypingError("vector operation: expected equal vector types")
    return first


def emit_constant(lanes: int, values: Any) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(values))


def emit_pointer(context: Any, builder: Any, array_type: types.Array, array: Any, index: Any, target: ir.Type) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def emit_call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _suffix(vector: Vector) -> str:
    return f"v{vector.lanes}{_SUFFIXES[vector.element]}"


def _make_load(lanes: int) -> Callable[..., Any]:
    @intrinsic
    def load(typingctx: Any, array: Any, index: Any) -> Any:
        vector = Vector(array.dtype, lanes)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
            return builder.load(pointer, align=vector.align)

        return vector(array, types.intp), codegen

    return load


load16 = _make_load(16)
load32 = _make_load(32)
load64 = _make_load(64)


@intrinsic
def store(typingctx: Any, array: Any, index: Any, vector: Any) -> Any:
    """Writes a vector to ``array[index : index + lanes]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
        builder.store(args[2], pointer, align=vector.align)

    return types.void(array, types.intp, vector), codegen


def _first_lanes(builder: Any, lanes: int, count: Any) -> Any:
    """Mask of the lanes below ``count``."""
    narrow = builder.trunc(count, ir.IntType(32))
    return builder.icmp_unsigned("<", emit_constant(lanes, range(lanes)), emit_splat(builder, narrow, lanes))


def emit_splat(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, emit_constant(lanes, [0] * lanes))


@intrinsic
def store_first(typingctx: Any, array: Any, index: Any, vector: Any, count: Any) -> Any:
    """Writes the first ``count`` lanes to ``array[index : index + count]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
        mask = _first_lanes(builder, vector.lanes, args[3])
        name = f"llvm.masked.store.{_suffix(vector)}.p0"
        align = ir.Constant(ir.IntType(32), vector.align)
        emit_call(builder, name, ir.VoidType(), [args[2], pointer, align, mask])

    return types.void(array, types.intp, vector, types.intp), codegen


@intrinsic
def load16_first(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """Reads ``array[index : index + count]`` into the first lanes; the others are 0."""
    vector = Vector(array.dtype, 16)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
        mask = _first_lanes(builder, vector.lanes, args[2])
        name = f"llvm.masked.load.{_suffix(vector)}.p0"
        align = ir.Constant(ir.IntType(32), vector.align)
        return emit_call(builder, name, vector.llvm, [pointer, align, mask, ir.Constant(vector.llvm, None)])

    return vector(array, types.intp, types.intp), codegen


def _make_splat(lanes: int) -> Callable[..., Any]:
    @intrinsic
    def splat(typingctx: Any, scalar: Any) -> Any:
        vector = Vector(scalar, lanes)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit_splat(builder, args[0], lanes)

        return vector(scalar), codegen

    return splat


splat16 = _make_splat(16)
splat32 = _make_splat(32)
splat64 = _make_splat(64)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` in each lane, rounded once on every machine."""
    vector = _lanes_of(a, b, c)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, f"llvm.fma.{_suffix(vector)}", vector.llvm, list(args))

    return vector(a, b, c), codegen


def _make_binary(emit: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        vector = _lanes_of(a, b)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], args[1])

        return vector(a, b), codegen

    return operation


def _emit_maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _emit_minimum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


add = _make_binary(lambda builder, a, b: builder.fadd(a, b))
sub = _make_binary(lambda builder, a, b: builder.fsub(a, b))
mul = _make_binary(lambda builder, a, b: builder.fmul(a, b))
divide = _make_binary(lambda builder, a, b: builder.fdiv(a, b))
maximum = _make_binary(_emit_maximum)
minimum = _make_binary(_emit_minimum)
xor = _make_binary(lambda builder, a, b: builder.xor(a, b))
add_words = _make_binary(lambda builder, a, b: builder.add(a, b))


def _make_cast(element: Any, emit: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @intrinsic
    def cast(typingctx: Any, vector: Any) -> Any:
        result = Vector(element, vector.lanes)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], result.llvm)

        return result(vector), codegen

    return cast


widen = _make_cast(types.float64, lambda builder, value, target: builder.fpext(value, target))
narrow = _make_cast(types.float32, lambda builder, value, target: builder.fptrunc(value, target))


@intrinsic
def magnitude(typingctx: Any, vector: Any) -> Any:
    """Absolute value of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, f"llvm.fabs.{_suffix(vector)}", vector.llvm, [args[0]])

    return vector(vector), codegen


@intrinsic
def bits_below(typingctx: Any, vector: Any, limit: Any) -> Any:
    """Bit i of the result is 1 where ``|lane i| < limit`` or lane i is NaN."""
    result: Any = {32: types.uint32, 64: types.uint64}[vector.lanes]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = emit_call(builder, f"llvm.fabs.{_suffix(vector)}", vector.llvm, [args[0]])
        mask = builder.fcmp_unordered("<", size, emit_splat(builder, args[1], vector.lanes))
        return builder.bitcast(mask, ir.IntType(vector.lanes))

    return result(vector, vector.element), codegen


@intrinsic
def popcount(typingctx: Any, words: Any) -> Any:
    """Set bits of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, f"llvm.ctpop.{_suffix(words)}", words.llvm, [args[0]])

    return words(words), codegen


@intrinsic
def sign_bits(typingctx: Any, vector: Any) -> Any:
    """Bit i of the result is 1 where lane i is ``>= 0``; -0.0 is, NaN is not."""
    result: Any = {16: types.uint16, 32: types.uint32, 64: types.uint64}[vector.lanes]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.fcmp_ordered(">=", args[0], ir.Constant(vector.llvm, None))
        return builder.bitcast(mask, ir.IntType(vector.lanes))

    return result(vector), codegen


@intrinsic
def store_bits(typingctx: Any, array: Any, index: Any, bits: Any) -> Any:
    """Writes an unsigned number over ``array[index:]``, least significant word first on little-endian."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = emit_pointer(context, builder, signature.args[0], args[0], args[1], args[2].type)
        builder.store(args[2], pointer, align=_bytes_of(array.dtype))

    return types.void(array, types.intp, bits), codegen


@intrinsic
def sum_lanes(typingctx: Any, vector: Any) -> Any:
    """Sum of all lanes, upper half onto lower half until one is left: the same order everywhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, lanes = args[0], vector.lanes
        while lanes > 1:
            half = lanes // 2
            low = builder.shuffle_vector(value, value, emit_constant(half, range(half)))
            high = builder.shuffle_vector(value, value, emit_constant(half, range(half, lanes)))
            value, lanes = builder.fadd(low, high), half
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.element(vector), codegen
