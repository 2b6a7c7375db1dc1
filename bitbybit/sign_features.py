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

Sliding = tuple[tuple[int, int], tuple[int, int]]  # stride and dilation

# For z ~ N(0, 1) the best straight line through sign(z) has this slope.
SIGN_SLOPE = math.sqrt(2 / math.pi)


def is_compiled(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled loops take a computation in some type: bfloat16 on a CPU, and something to compute."""
    return integer_cpu is not None and dtype == torch.bfloat16 and values.device.type == "cpu" and values.numel() > 0


def centres_images(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled loops quantise and centre images, for a computation in some type on a CPU."""
    narrow = dtype in (torch.bfloat16, torch.float32) and values.dtype in (torch.bfloat16, torch.float32)
    return integer_cpu is not None and narrow and values.device.type == "cpu" and values.numel() > 0


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


LATENT_MEAN = 0.3  # mean size of a latent value: some hundred steps of Adam at 1e-3 from the other sign

# Steps of the uniform quantiser with 1 to 4 bits that is nearest to a normal variable of spread 1.
# Source: Max 1960, "Quantizing for minimum distortion", table II; a step of one bit is never looked at.
_NORMAL_STEPS = (1.0, 0.9957, 0.5860, 0.3352)


def code_step(bits: int) -> float:
    """How far latent values of neighbouring codes are apart, if latent values are spread like a normal variable."""
    return _NORMAL_STEPS[bits - 1] * LATENT_MEAN * math.sqrt(math.pi / 2)


def code_values(latent: Tensor, bits: int) -> Tensor:
    """Odd whole numbers within ``+-(2 ** bits - 1)``, in the type and shape of the latent values; 0 belongs to +1."""
    if bits == 1:
        return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
    half = 2 ** (bits - 1)
    return 2 * torch.floor(latent / code_step(bits)).clamp_(-half, half - 1) + 1


def code_planes(values: Tensor, bits: int) -> Tensor:
    """Planes of bits, the least first, of ``code_values``: bool[bits, ...].

    A value is the sum over planes p of ``2 ** p`` where a bit is 1, and ``-2 ** p`` where it is 0.
    """
    numbers = ((values + (2**bits - 1)) / 2).to(torch.uint8)
    return torch.stack([(numbers >> plane & 1).bool() for plane in range(bits)])


def widened_latent(latent: Tensor, bits: int) -> Tensor:
    """Latent values of ``bits`` bits whose codes are the signs of those given, of 1 bit.

    They lie within a step of zero, those of decided signs farther out, and none so near to either end that a first
    step of training at a low rate changes its code: many changed at once would cost more than each is worth.
    """
    inside = code_step(bits) * (0.3 + 0.6 * latent.abs().clamp_max(1))
    return torch.where(latent >= 0, inside, -inside)


class CodeLatent(Function):
    """``code_values`` of latent values; the gradient passes where ``|latent| <= 1``, as if a code were its latent."""

    @staticmethod
    def forward(ctx, latent: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(latent)
        return code_values(latent, bits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (latent,) = ctx.saved_tensors
        return grad * (latent.abs() <= 1), None


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
