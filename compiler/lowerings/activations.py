"""Activations: element by element, or a softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from compiler.graph import Value, array_of
from compiler.layers import clip_bound
from compiler.lowerings.context import Context
from runtime.opset import FLOAT_MAX


def relu(ctx: Context, input: Value, inplace: bool = False) -> Value:
    """``max(x, 0)``."""
    return ctx.emit("Relu", [input])


def clip(ctx: Context, x: Value, least: float, greatest: float, label: str = "output") -> Value:
    """``min(max(x, least), greatest)``, or a Relu where that is the same."""
    least, greatest = clip_bound(least), clip_bound(greatest)
    if math.isnan(least) or math.isnan(greatest):
        raise ctx.refuse(f"has bounds of {least} and {greatest}, expected numbers", "give numbers as bounds")
    if (least, greatest) == (0.0, FLOAT_MAX):
        return ctx.emit("Relu", [x], x.shape, label)
    bounds = [ctx.constant("clip_min", least), ctx.constant("clip_max", greatest)]
    return ctx.emit("Clip", [x, *bounds], x.shape, label)


def relu6(ctx: Context, input: Value, inplace: bool = False) -> Value:
    """Clip to 0..6."""
    return clip(ctx, input, 0.0, 6.0)


def hardtanh(ctx: Context, input: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Value:
    """Clip to ``min_val..max_val``."""
    return clip(ctx, input, min_val, max_val)


def clamp(ctx: Context, input: Value, min: Any = None, max: Any = None) -> Value:
    """Clip to numbers, either of which may be missing."""
    if isinstance(min, Value) or isinstance(max, Value):
        raise ctx.refuse("its bounds are tensors", "give numbers as bounds")
    return clip(ctx, input, -FLOAT_MAX if min is None else min, FLOAT_MAX if max is None else max)


def leaky_relu(ctx: Context, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    """``x`` above 0, ``negative_slope * x`` below."""
    return ctx.emit("LeakyRelu", [input], alpha=float(negative_slope))


def elu(ctx: Context, input: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    """``x`` above 0, ``alpha (exp(x) - 1)`` below."""
    return ctx.emit("Elu", [input], alpha=float(alpha))


def prelu(ctx: Context, input: Value, weight: Any = None) -> Value:
    """``x`` above 0, a learned slope below: one for all channels, or one for each."""
    if isinstance(ctx.module, nn.PReLU):
        slope = array_of(ctx.module.weight)
    elif isinstance(weight, Value) and weight.constant is not None:
        slope = weight.constant
    else:
        raise ctx.refuse("its slope depends on the input", "make the slope a parameter")
    per_channel = slope.reshape(-1, *([1] * (len(input.shape) - 2))) if len(input.shape) > 1 else slope
    return ctx.emit("PRelu", [input, ctx.constant("slope", per_channel)])


def hardsigmoid(ctx: Context, input: Value, inplace: bool = False) -> Value:
    """``clip(x / 6 + 1/2, 0, 1)``."""
    return ctx.emit("HardSigmoid", [input], alpha=float(np.float32(1 / 6)), beta=0.5)


def silu(ctx: Context, input: Value, inplace: bool = False) -> Value:
    """``x * sigmoid(x)``."""
    gate = ctx.emit("Sigmoid", [input], label="gate")
    return ctx.emit("Mul", [input, gate])


def gelu(ctx: Context, input: Value, approximate: str = "none") -> Value:
    """``x`` times the normal distribution's cumulative function, or torch's tanh approximation of it."""
    return ctx.emit("Gelu", [input], approximate=approximate)


def softmax(ctx: Context, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    """Softmax along one axis."""
    return _normalised(ctx, "Softmax", input, dim, dtype)


def log_softmax(ctx: Context, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    """Logarithm of the softmax along one axis."""
    return _normalised(ctx, "LogSoftmax", input, dim, dtype)


def _normalised(ctx: Context, operator: str, x: Value, dim: int | None, dtype: Any) -> Value:
    if dim is None or dtype is not None:
        raise ctx.refuse("needs an axis, and float32 in and out", "pass dim, and no dtype")
    axis = ctx.axis(dim)
    ctx.fixed(x, axis)
    return ctx.emit(operator, [x], axis=axis)
