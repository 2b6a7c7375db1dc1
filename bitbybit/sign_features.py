"""Signs, roundings and sign features with straight-through gradients, for ``bitbybit.integer``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

try:
    from bitbybit import integer_cpu
except ImportError:  # no Numba: the same numbers from torch operators
    integer_cpu = None  # type: ignore[assignment]

# For z ~ N(0, 1) the best straight line through sign(z) has this slope.
SIGN_SLOPE = math.sqrt(2 / math.pi)


def is_compiled(values: Tensor) -> bool:
    """Whether the compiled loops take a computation: bfloat16 on a CPU, and something to compute."""
    return (
        integer_cpu is not None
        and values.dtype == torch.bfloat16
        and values.device.type == "cpu"
        and values.numel() > 0
    )


class SignLatent(Function):
    """``sign`` of latent values with ``sign(0) = +1``; the gradient passes where ``|value| <= 1``."""

    @staticmethod
    def forward(ctx, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return grad * (latent.abs() <= 1)


class Round(Function):
    """Rounds half to even and clamps; the gradient passes within the limits."""

    @staticmethod
    def forward(ctx, x: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low - 0.5, high + 0.5
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        return grad.masked_fill((x < low) | (x > high), 0), None, None


class SignFeatures(Function):
    """``n sign(P v)``, with the gradient of the straight line ``slope P v`` through it.

    The slope is that of the best line for Gaussian projections, so that the gradient is unbiased in the mean.
    """

    @staticmethod
    def forward(ctx, v: Tensor, projection: Tensor, norms: Tensor, slope: float, geometry: tuple, offset) -> Tensor:
        stride, dilation = geometry
        z = F.conv2d(v, projection, stride=stride, dilation=dilation)
        if offset is not None:
            z = z + offset
        ctx.save_for_backward(v, projection)
        ctx.slope, ctx.geometry = slope, geometry
        if is_compiled(z):
            assert integer_cpu is not None
            return integer_cpu.apply_signs(z, norms)
        wide = norms.repeat_interleave(projection.shape[0] // norms.shape[1], 1) if norms.shape[1] > 1 else norms
        return torch.where(z >= 0, wide, -wide)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        v, projection = ctx.saved_tensors
        stride, dilation = ctx.geometry
        grad_v, grad_p, _ = torch.ops.aten.convolution_backward(
            grad, v, projection, None, list(stride), [0, 0], list(dilation), False, [0, 0], 1,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )  # fmt: skip
        grad_v = None if grad_v is None else grad_v.mul_(ctx.slope)
        return grad_v, None if grad_p is None else grad_p.mul_(ctx.slope), None, None, None, None
