"""What moves numbers without changing them: shapes, slices, pads, joins."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np

from compiler.graph import Value
from compiler.lowerings.context import Context
from compiler.shapes import BATCH, Shape

PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
Index = int | slice | EllipsisType | None


def reshape(ctx: Context, input: Value, *shape: Any, **named: Any) -> Value:
    """Any view of the same numbers in the same order; the trace knows the shape."""
    return ctx.reshape(input, ctx.shape)


def permute(ctx: Context, input: Value, *dims: Any) -> Value:
    """Axes in another order."""
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return ctx.emit("Transpose", [input], perm=[ctx.axis(axis) for axis in order])


def transpose(ctx: Context, input: Value, dim0: int, dim1: int) -> Value:
    """Two axes swapped."""
    order = list(range(len(input.shape)))
    a, b = ctx.axis(dim0), ctx.axis(dim1)
    order[a], order[b] = order[b], order[a]
    return ctx.emit("Transpose", [input], perm=order)


def cat(ctx: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Tensors side by side."""
    if not all(isinstance(tensor, Value) for tensor in tensors):
        raise ctx.refuse("joins something that is no tensor", "join tensors only")
    axis = ctx.axis(dim)
    for tensor in tensors:
        ctx.fixed(tensor, axis)
    return ctx.emit("Concat", list(tensors), axis=axis)


def split(
    ctx: Context, input: Value, split_size_or_sections: Any = None, dim: int = 0, **named: Any
) -> tuple[Value, ...]:
    """Tensors cut along an axis; also ``chunk``, as the trace knows the pieces."""
    pieces = ctx.node.meta["value"]
    axis = ctx.axis(dim, len(input.shape))
    ctx.fixed(input, axis)
    sizes = [piece.shape[axis] for piece in pieces]
    outputs = [Value(f"{ctx.prefix}/output_{i}", piece.shape) for i, piece in enumerate(pieces)]
    inputs = [input, ctx.constant("sizes", sizes)]
    ctx.builder.node("Split", inputs, outputs, name=f"{ctx.prefix}/Split", axis=axis)
    return tuple(outputs)


def getitem(ctx: Context, input: Any, index: Any) -> Any:
    """An item of a tuple, or a slice of a tensor."""
    if isinstance(input, tuple):
        return input[index]
    items = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in items):
        raise ctx.refuse("indexes with a tensor or a list", "use numbers, slices, None and ...")
    cut, shape = _slice(ctx, input, _spelled_out(items, len(input.shape)))
    if shape == ctx.shape and cut.name == f"{ctx.prefix}/output":
        return cut
    return ctx.reshape(cut, ctx.shape)


def _spelled_out(items: tuple[Index, ...], rank: int) -> list[int | slice]:
    """One integer or slice for each axis of the input; None only adds an axis to the result."""
    kept = [item for item in items if item is not None]
    missing = rank - sum(item is not Ellipsis for item in kept)
    found: list[int | slice] = []
    for item in kept:
        found += [slice(None)] * missing if isinstance(item, EllipsisType) else [item]
    return found + [slice(None)] * (rank - len(found))


def _slice(ctx: Context, x: Value, items: list[int | slice], *, last: bool = True) -> tuple[Value, Shape]:
    """Cuts a tensor; where this is the call's ``last`` step, the result may be its output."""
    cuts: list[tuple[int, int, int, int]] = []  # start, end, axis, step
    shape = list(x.shape)
    for axis, item in enumerate(items):
        if item == slice(None):
            continue
        extent = ctx.fixed(x, axis)
        if isinstance(item, int):
            item = slice(item % extent, item % extent + 1)
        if not all(bound is None or isinstance(bound, int) for bound in (item.start, item.stop, item.step)):
            raise ctx.refuse("slices by something that depends on the input", "slice by numbers")
        start, end, step = item.indices(extent)
        if (start, end, step) == (0, extent, 1):
            continue
        cuts.append((start, end, axis, step))
        shape[axis] = max(0, -(-(end - start) // step))
    if not cuts:
        return x, x.shape
    names = ("starts", "ends", "axes", "steps")
    bounds = [ctx.constant(name, list(values)) for name, values in zip(names, zip(*cuts, strict=True), strict=True)]
    label = "output" if last and tuple(shape) == ctx.shape else "sliced"
    return ctx.emit("Slice", [x, *bounds], tuple(shape), label), tuple(shape)


def pad(ctx: Context, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Rims of a number, or of mirrored or repeated pixels; ``pad`` counts from the last axis, below 0 it cuts off."""
    if mode not in PAD_MODES or not all(isinstance(amount, int) for amount in pad):
        raise ctx.refuse(f"pads with mode {mode!r}", f"use one of {', '.join(PAD_MODES)}, with numbers as amounts")
    rank = len(input.shape)
    begin, end = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    if begin[0] or end[0]:
        raise ctx.refuse("pads the batch", "pad the other axes only")
    if min(pad, default=0) < 0:
        if mode != "constant":
            raise ctx.refuse(f"cuts off (pad {list(pad)}) with mode {mode!r}", "slice the tensor before padding it")
        items: list[int | slice] = [
            slice(-b if b < 0 else None, e if e < 0 else None) for b, e in zip(begin, end, strict=True)
        ]
        begin, end = [max(0, b) for b in begin], [max(0, e) for e in end]
        input, _ = _slice(ctx, input, items, last=not any(begin + end))
        if not any(begin + end):
            return input
    inputs = [input, ctx.constant("pads", begin + end)]
    if mode == "constant":
        inputs.append(ctx.constant("pad_value", float(value or 0.0)))
    return ctx.emit("Pad", inputs, mode=PAD_MODES[mode])


def constant_pad(ctx: Context, input: Value, padding: Sequence[int], value: float = 0.0) -> Value:
    """``nn.ZeroPad2d`` and ``nn.ConstantPad2d``."""
    return pad(ctx, input, padding, value=value)


def expand(ctx: Context, input: Value, *sizes: Any) -> Value:
    """Axes of extent 1 repeated."""
    rank = len(ctx.shape)
    padded = (1,) * (rank - len(input.shape)) + tuple(input.shape)
    if any(new == BATCH and old != BATCH for old, new in zip(padded, ctx.shape, strict=True)):
        raise ctx.refuse("repeats a value for every sample", "let the addition or product broadcast instead")
    target = np.asarray([1 if extent == BATCH else extent for extent in ctx.shape], np.int64)
    return ctx.emit("Expand", [input, ctx.constant("shape", target)])
