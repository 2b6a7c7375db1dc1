"""The integer layers' answer and gradients as a plain autograd expression: slow, short, and what tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bitbybit.exact_limits import NORM_LIMIT
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.sign_features import SIGN_SLOPE, code_values


def straight_through(value: Tensor, slope: Tensor) -> Tensor:
    """``value`` forward, the gradient of ``slope`` backward."""
    return value.detach() + (slope - slope.detach())  # the difference is exactly 0


def reference_forward(layer: IntegerHashConv2d | IntegerHashLinear, x: Tensor) -> Tensor:
    """A layer's answer from unfolded windows, tile by tile and tap by tap.

    Args:
        layer: an integer layer, without noise.
        x: float32[n, c, h, w], or float32[..., features].

    Returns:
        float32[n, o, oh, ow], or float32[..., o].
    """
    if isinstance(layer, IntegerHashLinear):
        columns = x.reshape(-1, layer.in_features)
        vectors = _quantised(layer, columns) - layer.integer_centre().float()
        y = _homogeneous(*_estimate(layer, vectors, 0, 0), vectors)
        return (y * layer.scale + layer.bias).view(*x.shape[:-1], -1)
    q = F.pad(_quantised(layer, x), layer.pads) - layer.integer_centre().float().view(-1, 1, 1)
    n, taps = len(x), math.prod(layer.kernel_size)
    windows = F.unfold(q, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    windows = windows.reshape(-1, layer.in_channels, taps)  # positions, channels, taps
    total, on_line = windows.new_zeros(()), windows.new_zeros(())
    for tap in range(taps if layer.pixel else 1):
        vectors = windows[:, :, tap] if layer.pixel else windows.flatten(1)
        answer, line = _estimate(layer, vectors, *divmod(tap, layer.kernel_size[1]))
        total, on_line = total + answer, on_line + line
    y = _homogeneous(total, on_line, windows.flatten(1)) * layer.scale + layer.bias
    return y.view(n, *layer.output_size(*x.shape[2:]), -1).permute(0, 3, 1, 2)


def _quantised(layer: IntegerHashConv2d | IntegerHashLinear, x: Tensor) -> Tensor:
    low, high = layer.input_range()
    exact = torch.ldexp(x, layer.input_exponent)
    return straight_through(exact.round().clamp(low, high), exact.clamp(low - 0.5, high + 0.5))


def _homogeneous(answer: Tensor, line: Tensor, windows: Tensor) -> Tensor:
    """``answer``, which grows with the windows' lengths also where it departs from the straight line.

    Args:
        answer, line: float32[m, o].
        windows: float32[m, features], centred.
    """
    square = windows.square().sum(1, keepdim=True)
    length = torch.where(square > 0, square, 1.0).sqrt()
    return answer + (answer - line).detach() * (length / length.detach() - 1)


def _estimate(layer: IntegerHashConv2d | IntegerHashLinear, vectors: Tensor, ky: int, kx: int) -> tuple[Tensor, Tensor]:
    """``sum over tiles of n h_x . h_w`` of centred vectors, and the line that it follows.

    Args:
        layer: of which the weights' codes are taken.
        vectors: float32[m, features].
        ky, kx: the tap.

    Returns:
        Both float32[m, o].
    """
    bits, k = layer.spec.hash_length, layer.code_weight
    total, on_line = vectors.new_zeros(()), vectors.new_zeros(())
    for t, p in enumerate(layer.tile_projections()):
        v = vectors[:, t * layer.tile_size : (t + 1) * layer.tile_size]
        z = v @ p.T
        norm = (v.detach().double().norm(dim=1, keepdim=True) * layer.norm_scale.double() + 0.5).floor()
        norm = norm.clamp(max=NORM_LIMIT).float()
        lengths = p.detach().norm(dim=1)
        line = z * (SIGN_SLOPE * math.sqrt(p.shape[1]) * layer.norm_scale / lengths)
        features = straight_through(torch.where(z >= 0, norm, -norm), line)
        latent = k[:, t * bits : (t + 1) * bits, ky, kx]
        values = straight_through(code_values(latent, layer.spec.code_bits), latent.clamp(-1, 1))
        total, on_line = total + features @ values.T, on_line + line @ values.T
    return total, on_line
