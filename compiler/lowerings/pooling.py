"""Pooling.  Windows that ``ceil_mode`` lets hang over the edge become explicit pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.graph import Value
from compiler.layers import pair
from compiler.lowerings.context import Context
from runtime.opset import FLOAT_MAX

Size = int | Sequence[int]


def max_pool2d(
    ctx: Context,
    input: Value,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    """The greatest value of each window; pads never win."""
    if return_indices:
        raise ctx.refuse("returns indices", "set return_indices=False")
    kernel, strides = pair(kernel_size), pair(stride or kernel_size)
    dilations, pads = pair(dilation), _pads(ctx, input, kernel_size, strides, padding, dilation)
    x = input
    if any(pad >= size for pad, size in zip(pads, (*kernel, *kernel), strict=True)):
        # onnxruntime refuses a pad as large as the window
        x = _pad(ctx, x, pads, -FLOAT_MAX)
        pads = (0, 0, 0, 0)
    return ctx.emit("MaxPool", [x], kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations)


def avg_pool2d(
    ctx: Context,
    input: Value,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """The mean of each window, divided by what torch counts."""
    kernel, strides, (py, px) = pair(kernel_size), pair(stride or kernel_size), pair(padding)
    pads = _pads(ctx, input, kernel_size, strides, padding, 1)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    if pads == (py, px, py, px) and divisor_override is None and (count_include_pad or not any(pads)):
        return ctx.emit("AveragePool", [input], pads=pads, count_include_pad=int(any(pads)), **attributes)
    # Divides by the whole window first, then by what torch counts of it.
    counts = [
        _counted(ctx.fixed(input, axis), kernel[i], strides[i], (py, px)[i], count_include_pad, _extent(ctx, axis))
        for i, axis in enumerate((-2, -1))
    ]
    area = kernel[0] * kernel[1]
    counted = np.outer(*counts) if divisor_override is None else np.full([len(c) for c in counts], divisor_override)
    sums = ctx.emit("AveragePool", [_pad(ctx, input, pads, 0.0)], label="mean", **attributes)
    return ctx.emit("Mul", [sums, ctx.constant("share", (area / counted).astype(np.float32))])


def _counted(extent: int, kernel: int, stride: int, pad: int, include_pad: bool, windows: int) -> np.ndarray[Any, Any]:
    """How many places of each window along one axis torch counts."""
    starts = np.arange(windows) * stride - pad
    low, high = (-pad, extent + pad) if include_pad else (0, extent)
    return np.minimum(starts + kernel, high) - np.maximum(starts, low)


def _pads(
    ctx: Context, x: Value, kernel: Size, strides: tuple[int, int], padding: Size, dilation: Size
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), the last two such that the windows end at the edge or beyond."""
    ends = []
    for i, axis in enumerate((-2, -1)):
        reach = pair(dilation)[i] * (pair(kernel)[i] - 1) + 1
        needed = (_extent(ctx, axis) - 1) * strides[i] + reach
        pad = pair(padding)[i]
        ends.append(pad + max(0, needed - (ctx.fixed(x, axis) + 2 * pad)))
    return (*pair(padding), *ends)  # type: ignore[return-value]


def _extent(ctx: Context, axis: int) -> int:
    extent = ctx.shape[axis]
    assert isinstance(extent, int)
    return extent


def _pad(ctx: Context, x: Value, pads: tuple[int, int, int, int], value: float) -> Value:
    if not any(pads):
        return x
    top, left, bottom, right = pads
    rows, columns = ctx.fixed(x, -2) + top + bottom, ctx.fixed(x, -1) + left + right
    before, after = [0] * (len(x.shape) - 2), [0] * (len(x.shape) - 2)
    amounts = ctx.constant("pads", [*before, top, left, *after, bottom, right])
    fill = ctx.constant("pad_value", float(value))
    return ctx.emit("Pad", [x, amounts, fill], (*x.shape[:-2], rows, columns), "padded")


def adaptive_avg_pool2d(ctx: Context, input: Value, output_size: Any) -> Value:
    """Means of equal windows, or of the whole image; a matrix product an axis where windows are unequal."""
    rows, columns = _windows(ctx, input, -2), _windows(ctx, input, -1)
    if rows.equal and columns.equal:
        return _adaptive(ctx, input, "AveragePool", (rows.size, columns.size))
    across = ctx.constant("columns", columns.means().T.copy())
    y = ctx.emit("MatMul", [input, across], (*input.shape[:-1], ctx.shape[-1]), "columns_pooled")
    return ctx.emit("MatMul", [ctx.constant("rows", rows.means()), y])


def adaptive_max_pool2d(ctx: Context, input: Value, output_size: Any, return_indices: bool = False) -> Value:
    """Greatest values of equal windows, or of the whole image."""
    if return_indices:
        raise ctx.refuse("returns indices", "set return_indices=False")
    rows, columns = _windows(ctx, input, -2), _windows(ctx, input, -1)
    for windows in (rows, columns):
        if not windows.equal:
            raise ctx.refuse(
                f"{windows.count} windows do not divide {windows.extent} pixels evenly",
                "choose an output size that divides the input, or another input size",
            )
    return _adaptive(ctx, input, "MaxPool", (rows.size, columns.size))


@dataclass(frozen=True)
class _Windows:
    """Windows of an adaptive pool along one axis: window i covers floor(i e / m) to ceil((i + 1) e / m)."""

    extent: int
    count: int

    @property
    def equal(self) -> bool:
        return self.extent % self.count == 0

    @property
    def size(self) -> int:
        return self.extent // self.count

    def means(self) -> np.ndarray[Any, Any]:
        """float32[count, extent]; each row averages one window."""
        matrix = np.zeros((self.count, self.extent), np.float32)
        for i in range(self.count):
            start, stop = i * self.extent // self.count, -(-(i + 1) * self.extent // self.count)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix


def _windows(ctx: Context, x: Value, axis: int) -> _Windows:
    return _Windows(ctx.fixed(x, axis), _extent(ctx, axis))


def _adaptive(ctx: Context, x: Value, operator: str, kernel: tuple[int, int]) -> Value:
    if ctx.shape[-2:] == (1, 1):
        return ctx.emit(f"Global{operator}", [x])
    return ctx.emit(operator, [x], kernel_shape=kernel, strides=kernel)
