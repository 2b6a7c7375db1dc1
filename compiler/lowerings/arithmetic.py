"""Arithmetic on tensors and numbers, reductions, and batch norm that stands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bitbybit.folding import batch_norm_scale
from compiler.graph import Value, array_of
from compiler.lowerings.context import Context


def unary(operator: str) -> Callable[..., Value]:
    """A lowering to one ONNX operator of one input."""

    def lower(ctx: Context, input: Value, inplace: bool = False) -> Value:
        return ctx.emit(operator, [input])

    return lower


def binary(operator: str) -> Callable[..., Value]:
    """A lowering to one ONNX operator of two inputs, either of which may be a number."""

    def lower(ctx: Context, input: Any, other: Any, *, alpha: float = 1, rounding_mode: str | None = None) -> Value:
        if rounding_mode is not None:
            raise ctx.refuse(f"rounds ({rounding_mode})", "divide without rounding_mode")
        for side in (input, other):
            if not isinstance(side, Value | int | float):
                raise ctx.refuse(
                    "one side depends on the batch size or is no number", "compute with tensors and numbers"
                )
        right = ctx.operand(other, "other")
        if alpha != 1:
            right = ctx.emit("Mul", [right, ctx.constant("alpha", float(alpha))], right.shape, "scaled")
        return ctx.emit(operator, [ctx.operand(input, "input"), right])

    return lower


def reduction(operator: str) -> Callable[..., Value]:
    """A lowering to an ONNX reduction over given axes."""

    def lower(
        ctx: Context, input: Value, dim: int | Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Value:
        if dim is None or dtype is not None:
            raise ctx.refuse("reduces over every axis, the batch too, or converts", "pass dim, and no dtype")
        dims = [dim] if isinstance(dim, int) else list(dim)
        axes = [ctx.axis(axis, len(input.shape)) for axis in dims]
        for axis in axes:
            ctx.fixed(input, axis)
        return ctx.emit(operator, [input, ctx.constant("axes", axes)], keepdims=int(keepdim))

    return lower


def matmul(ctx: Context, input: Value, other: Value) -> Value:
    """Matrix product."""
    return ctx.emit("MatMul", [input, other])


def batch_norm(ctx: Context, input: Value) -> Value:
    """``x * scale + shift`` for each channel."""
    norm = ctx.module
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    if norm.running_mean is None:
        raise ctx.refuse("has no running statistics", "train it with track_running_stats=True")
    return _scale(ctx, input, *batch_norm_scale(norm))


def functional_batch_norm(
    ctx: Context,
    input: Value,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    weight: Value | None = None,
    bias: Value | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    """``F.batch_norm`` with running statistics."""
    if training or running_mean is None or running_var is None:
        raise ctx.refuse("normalises by the batch's own statistics", "pass running statistics and training=False")
    constants = [None if v is None else v.constant for v in (running_mean, running_var, weight, bias)]
    given = [v for v in (running_mean, running_var, weight, bias) if v is not None]
    if any(v.constant is None for v in given):
        raise ctx.refuse("its statistics depend on the input", "make them buffers")
    mean, var, gamma, beta = (None if c is None else torch.from_numpy(c).double() for c in constants)
    assert mean is not None and var is not None
    norm = nn.BatchNorm2d(len(mean), eps)
    norm.running_mean, norm.running_var = mean, var
    norm.register_parameter("weight", None if gamma is None else nn.Parameter(gamma))
    norm.register_parameter("bias", None if beta is None else nn.Parameter(beta))
    return _scale(ctx, input, *batch_norm_scale(norm))


def _scale(ctx: Context, x: Value, scale: torch.Tensor, shift: torch.Tensor) -> Value:
    shape = (-1, *([1] * (len(x.shape) - 2)))
    product = ctx.emit("Mul", [x, ctx.constant("scale", _rounded(scale, shape))], label="scaled")
    return ctx.emit("Add", [product, ctx.constant("shift", _rounded(shift, shape))])


def _rounded(values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return array_of(values).reshape(shape)
