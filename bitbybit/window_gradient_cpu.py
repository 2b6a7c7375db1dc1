"""A compiled loop for the gradient that grows with a window's length; see ``hash_product``.

Everything is channels-last, in float32 or in bfloat16, as its bits: uint16.  Sums are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from torch import Tensor

from bitbybit.integer_cpu import as_images, as_tensor
from bitbybit.parallel_cpu import in_parallel
from runtime.kernels.compiling import compiled, inlined
from runtime.kernels.vectors import Vector, emit_pointer, fma, intrinsic, splat16, sub, sum_lanes

Pair = tuple[int, int]
_LANES = 16
_WORDS, _HALVES = ir.VectorType(ir.IntType(32), _LANES), ir.VectorType(ir.IntType(16), _LANES)


@intrinsic
def _load(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen values from ``array[index]`` on, as float32."""
    vector = Vector(types.float32, _LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            words = emit_pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
            return builder.load(words, align=4)
        halves = builder.load(emit_pointer(context, builder, signature.args[0], args[0], args[1], _HALVES), align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, _WORDS), _all(16)), vector.llvm)

    return vector(array, types.intp), codegen


@intrinsic
def _store(typingctx: Any, array: Any, index: Any, vector: Any) -> Any:
    """Writes sixteen float32 from ``array[index]`` on; bfloat16 is the nearest, ties to even, and not for NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            place = emit_pointer(context, builder, signature.args[0], args[0], args[1], args[2].type)
            builder.store(args[2], place, align=4)
            return None
        words = builder.bitcast(args[2], _WORDS)
        odd = builder.and_(builder.lshr(words, _all(16)), _all(1))
        rounded = builder.lshr(builder.add(builder.add(words, _all(0x7FFF)), odd), _all(16))
        place = emit_pointer(context, builder, signature.args[0], args[0], args[1], _HALVES)
        builder.store(builder.trunc(rounded, _HALVES), place, align=2)
        return None

    return types.void(array, types.intp, vector), codegen


def _all(number: int) -> ir.Constant:
    return ir.Constant(_WORDS, [number] * _LANES)


@inlined
def _sum_of_squares(v, start, channels):
    total = splat16(np.float32(0))
    for c in range(start, start + channels, _LANES):
        values = _load(v, c)
        total = fma(values, values, total)
    return sum_lanes(total)


@inlined
def _product_beyond(exact, on_line, grad, start, channels):
    total = splat16(np.float32(0))
    for c in range(start, start + channels, _LANES):
        total = fma(sub(_load(exact, c), _load(on_line, c)), _load(grad, c), total)
    return sum_lanes(total)


@compiled
def grow_with_length(grad_v, v, exact, on_line, grad, images, outputs, kernel, stride, dilation, squares, spread, line):
    """Adds the gradient of what answers are beyond the line, which grows with a window's length.

    Args:
        grad_v, v: [n * h * w * c], the first changed.
        exact, on_line, grad: [n * oh * ow * o]: the answer, the line's, and the answer's gradient.
        images, outputs: n, h, w, c; and oh, ow, o. c and o are multiples of 16.
        kernel, stride, dilation: rows and columns, of the line.
        squares, spread: float32[h * w], overwritten.
        line: float32[2 * w], overwritten.
    """
    count, height, width, channels = images
    rows, columns, features = outputs
    for n in range(count):
        for i in range(height * width):
            squares[i] = _sum_of_squares(v, (n * height * width + i) * channels, channels)
            spread[i] = np.float32(0)
        for i in range(rows):
            for j in range(2 * width):
                line[j] = np.float32(0)
            for y in range(kernel[0]):
                above = (i * stride[0] + y * dilation[0]) * width
                for j in range(width):
                    line[j] += squares[above + j]
            for j in range(columns):
                square = np.float32(0)
                for x in range(kernel[1]):
                    square += line[j * stride[1] + x * dilation[1]]
                start = ((n * rows + i) * columns + j) * features
                # Values are whole numbers: a window's square is 0, or 1 and more.
                share = _product_beyond(exact, on_line, grad, start, features) / max(square, np.float32(1))
                for x in range(kernel[1]):
                    line[width + j * stride[1] + x * dilation[1]] += share
            for y in range(kernel[0]):
                above = (i * stride[0] + y * dilation[0]) * width
                for j in range(width):
                    spread[above + j] += line[width + j]
        for i in range(height * width):
            share, start = splat16(spread[i]), (n * height * width + i) * channels
            for c in range(start, start + channels, _LANES):
                _store(grad_v, c, fma(_load(v, c), share, _load(grad_v, c)))


def fits(v: Tensor, answer: Tensor) -> bool:
    """Whether the loop takes a layer: as many channels in and out as fill vectors."""
    return v.shape[1] % _LANES == 0 and answer.shape[1] % _LANES == 0


def add_lengthwise(
    grad_v: Tensor, v: Tensor, exact: Tensor, on_line: Tensor, grad: Tensor, kernel: Pair, stride: Pair, dilation: Pair
) -> Tensor:
    """``grad_v`` with the gradient of what answers are beyond the line; see ``grow_with_length``.

    Args:
        grad_v: float32 or bfloat16[n, c, h, w], towards v through the line; overwritten where it is channels-last.
        v: [n, c, h, w], in its type, whole numbers.
        exact, on_line, grad: [n, o, oh, ow], in its type.
        kernel, stride, dilation: of the line.
    """
    arrays = [as_images(part) for part in (grad_v, v, exact, on_line, grad)]
    (_, c, h, w), (_, o, oh, ow) = v.shape, exact.shape

    def work(start: int, stop: int) -> None:
        scratch = [np.empty(size, np.float32) for size in (h * w, h * w, 2 * w)]
        flat = [array[start:stop].reshape(-1) for array in arrays]
        grow_with_length(*flat, (stop - start, h, w, c), (oh, ow, o), kernel, stride, dilation, *scratch)

    in_parallel(work, len(v), v[0].numel())
    return as_tensor(arrays[0], v.dtype)
