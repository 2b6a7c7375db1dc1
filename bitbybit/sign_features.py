"""Sign features, and signs and roundings with straight-through gradients, for ``bitbybit.integer``."""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

try:
    from bitbybit import integer_cpu
except ImportError:  # no Numba: the same numbers from torch operators
    integer_cpu = None  # type: ignore[assignment]

Geometry = tuple[tuple[int, int], tuple[int, int]]  # stride and dilation

# For z ~ N(0, 1) the best straight line through sign(z) has this slope.
SIGN_SLOPE = math.sqrt(2 / math.pi)


def is_compiled(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled loops take a computation in some type: bfloat16 on a CPU, and something to compute."""
    return integer_cpu is not None and dtype == torch.bfloat16 and values.device.type == "cpu" and values.numel() > 0


def gpu_kernels(values: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernels, where they take a computation in some type: bfloat16 on a GPU, and something to compute."""
    return _integer_gpu() if values.is_cuda and dtype == torch.bfloat16 and values.numel() > 0 else None


@functools.cache
def _integer_gpu() -> ModuleType | None:
    try:
        from bitbybit import integer_gpu
    except ImportError:  # no Triton: the same numbers from torch operators
        return None
    return integer_gpu


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
    def forward(ctx, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low - 0.5, high + 0.5
        return x.round().clamp_(low, high)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        return grad.masked_fill((x < low) | (x > high), 0), None, None


def whole_rows(p: Tensor, limit: int) -> Tensor:
    """Rows scaled so that the largest entry is ``limit``, and rounded."""
    peak = p.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return Round.apply(p * (limit / peak), -limit, limit)


def sign_features(seen: Tensor, norms: Tensor) -> Tensor:
    """``n sign(P v)`` of every hashed position: float[n, t * k, oh, ow], in the type of the norms.

    Args:
        seen: float[n, t * k, oh, ow], what comparators see of ``P v``.
        norms: float[n, t, oh, ow].
    """
    if is_compiled(seen, seen.dtype):
        assert integer_cpu is not None
        return integer_cpu.apply_signs(seen, norms)
    wide = norms.repeat_interleave(seen.shape[1] // norms.shape[1], 1) if norms.shape[1] > 1 else norms
    return torch.where(seen >= 0, wide, -wide)
