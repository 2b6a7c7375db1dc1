"""Triton kernels of the integer layers' training step: one launch where torch's operators take ten.

Images are channels-last, in any type that holds whole numbers up to 255; a pixel is a row of its channels.  Each kernel
computes what ``integer_base`` or ``hash_product`` defines with torch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

Pair = tuple[int, int]
ROUNDING = tl.constexpr(1.5 * 2.0**23)  # added to a number below 2^22, it leaves no place for a fraction
MOST_FEATURES = 128  # of a tile, held by a program together with its projections
MOST_BITS = 512
_PIXELS = 64  # of a program


@triton.jit
def _centre_kernel(
    v, x, centre, factor, low, high, pixels, height, width, rows, columns, top, left, channels,
    stride_n, stride_c, stride_h, stride_w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """v[p, c] = clamp(round(x 2^e)) - centre, over padded pixels p = (n, row, column)."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    n, i, j = p // (rows * columns), p // columns % rows - top, p % columns - left
    inside = (p < pixels) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    fits = c < channels
    place = n[:, None].to(tl.int64) * stride_n + i[:, None] * stride_h + j[:, None] * stride_w + c[None, :] * stride_c
    value = tl.load(x + place, mask=inside[:, None] & fits[None, :], other=0.0).to(tl.float32) * tl.load(factor)
    value = tl.maximum(value, tl.load(low), propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(value, tl.load(high), propagate_nan=tl.PropagateNan.ALL)
    value = (value + ROUNDING) - ROUNDING
    value -= tl.load(centre + c, mask=fits, other=0.0)[None, :]
    target = v + p[:, None].to(tl.int64) * channels + c[None, :]
    tl.store(target, value.to(v.dtype.element_ty), mask=(p < pixels)[:, None] & fits[None, :])


@triton.jit
def _uncentre_kernel(
    grad_x, grad_v, x, factor, low, high, pixels, height, width, rows, columns, top, left, channels,
    stride_n, stride_c, stride_h, stride_w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x[p, c] = grad_v 2^e where x was not clipped, over pixels p = (n, i, j) without pads."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    n, i, j = p // (height * width), p // width % height, p % width
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    place = n[:, None].to(tl.int64) * stride_n + i[:, None] * stride_h + j[:, None] * stride_w + c[None, :] * stride_c
    scale = tl.load(factor)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * scale
    passes = (value >= tl.load(low) - 0.5) & (value <= tl.load(high) + 0.5)
    padded = (n * rows + i + top) * columns + j + left
    grad = tl.load(grad_v + padded[:, None].to(tl.int64) * channels + c[None, :], mask=mask, other=0.0)
    found = tl.where(passes, grad.to(tl.float32) * scale, 0.0)
    tl.store(grad_x + p[:, None].to(tl.int64) * channels + c[None, :], found.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _features_kernel(
    features, v, projections, norm_scale, positions, rows, columns, height, width, stride_y, stride_x,
    channels, tile_size, bits, row_size,
    PIXELS: tl.constexpr, FEATURES: tl.constexpr, BITS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """features[m, t * bits + b] = n sign(P v), over hashed positions m and tiles t."""
    m = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    tile = tl.program_id(1)
    d, b = tl.arange(0, FEATURES), tl.arange(0, BITS)
    n, i, j = m // (rows * columns), m // columns % rows * stride_y, m % columns * stride_x
    pixel = (n * height + i) * width + j
    channel = tile * tile_size + d
    mask = (m < positions)[:, None] & ((d < tile_size) & (channel < channels))[None, :]
    part = tl.load(v + pixel[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
    wide = part.to(tl.float32)
    energy = tl.sum(wide * wide, 1).to(tl.float64)
    norm = tl.floor(tl.sqrt(energy) * tl.load(norm_scale).to(tl.float64) + 0.5).to(tl.float32)
    norm = tl.minimum(norm, LIMIT, propagate_nan=tl.PropagateNan.ALL)[:, None]
    rows_of_p = tl.load(projections + (tile * BITS + b)[None, :] * FEATURES + d[:, None])
    seen = tl.dot(part, rows_of_p.to(part.dtype))
    found = tl.where(seen >= 0, norm, -norm)
    target = features + m[:, None].to(tl.int64) * row_size + tile * bits + b[None, :]
    tl.store(target, found.to(features.dtype.element_ty), mask=(m < positions)[:, None] & (b < bits)[None, :])


@triton.jit
def _energy_kernel(energy, v, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """energy[p] = |v[p]|^2."""
    p, c = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(v + p[:, None].to(tl.int64) * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(energy + p, tl.sum(value * value, 1), mask=p < pixels)


@triton.jit
def _share_kernel(
    share, exact, on_line, grad, energy, positions, rows, columns, height, width, stride_y, stride_x, dilation_y,
    dilation_x, outputs, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """share[m] = sum of (exact - on_line) grad over outputs, divided by |window|^2."""
    m, o = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, OUTPUTS)
    valid = m < positions
    place = m[:, None].to(tl.int64) * outputs + o[None, :]
    mask = valid[:, None] & (o < outputs)[None, :]
    beyond = tl.load(exact + place, mask=mask, other=0.0).to(tl.float32)
    beyond -= tl.load(on_line + place, mask=mask, other=0.0).to(tl.float32)
    product = tl.sum(beyond * tl.load(grad + place, mask=mask, other=0.0).to(tl.float32), 1)
    n, i, j = m // (rows * columns), m // columns % rows * stride_y, m % columns * stride_x
    square = tl.zeros([POSITIONS], tl.float32)
    for y in tl.static_range(TAPS_Y):
        for x in tl.static_range(TAPS_X):
            pixel = (n * height + i + y * dilation_y) * width + j + x * dilation_x
            square += tl.load(energy + pixel, mask=valid, other=0.0)
    tl.store(share + m, product / tl.maximum(square, 1.0), mask=valid)  # v is whole: a square is 0, or 1 and more


@triton.jit
def _spread_kernel(
    grad_v, v, share, pixels, height, width, rows, columns, stride_y, stride_x, dilation_y, dilation_x, channels,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_v[p] += v[p] times the shares of the windows that p lies in."""
    p, c = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    n, i, j = p // (height * width), p // width % height, p % width
    total = tl.zeros([PIXELS], tl.float32)
    for y in tl.static_range(TAPS_Y):
        for x in tl.static_range(TAPS_X):
            top, left = i - y * dilation_y, j - x * dilation_x
            row, column = top // stride_y, left // stride_x
            there = (p < pixels) & (top >= 0) & (left >= 0) & (row < rows) & (column < columns)
            there = there & (row * stride_y == top) & (column * stride_x == left)
            total += tl.load(share + (n * rows + row) * columns + column, mask=there, other=0.0)
    place = p[:, None].to(tl.int64) * channels + c[None, :]
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(v + place, mask=mask, other=0.0).to(tl.float32)
    grown = tl.load(grad_v + place, mask=mask, other=0.0).to(tl.float32) + value * total[:, None]
    tl.store(grad_v + place, grown.to(grad_v.dtype.element_ty), mask=mask)


class CentreImages(Function):
    """Quantises, pads and centres images; the gradient passes where nothing was clipped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        low: Tensor,
        high: Tensor,
        centre: Tensor,
        pads: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """``x``: float[n, c, h, w]; ``factor``, ``low``, ``high``: float32[]; ``centre``: float32[c], whole."""
        n, c, h, w = x.shape
        left, right, top, bottom = pads
        v = _empty((n, c, h + top + bottom, w + left + right), dtype, x)
        ctx.save_for_backward(x, factor, low, high)
        ctx.pads = pads
        sizes = (h, w, *v.shape[2:], top, left, c)
        pixels = v.numel() // c
        _centre_kernel[(triton.cdiv(pixels, _PIXELS),)](
            v, x, centre, factor, low, high, pixels, *sizes, *x.stride(), _PIXELS, triton.next_power_of_2(c)
        )
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, low, high = ctx.saved_tensors
        (n, c, h, w), (left, _, top, _) = x.shape, ctx.pads
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = _empty((n, c, h, w), x.dtype, x)
        sizes = (h, w, *grad.shape[2:], top, left, c)
        _uncentre_kernel[(triton.cdiv(n * h * w, _PIXELS),)](
            grad_x, grad, x, factor, low, high, n * h * w, *sizes, *x.stride(), _PIXELS, triton.next_power_of_2(c)
        )
        return grad_x, *(None,) * 6


def fits(tile_size: int, hash_length: int) -> bool:
    """Whether a program of ``sign_features`` holds a tile and its projections."""
    return tile_size <= MOST_FEATURES and hash_length <= MOST_BITS


def padded_projections(projections: list[Tensor], tile_size: int) -> Tensor:
    """P as ``sign_features`` reads it: bfloat16[t, b, d] with b and d powers of two, zeros where nothing is."""
    bits = len(projections[0])
    shape = (len(projections), max(16, triton.next_power_of_2(bits)), max(16, triton.next_power_of_2(tile_size)))
    found = torch.zeros(shape, dtype=torch.bfloat16, device=projections[0].device)
    for tile, p in zip(found, projections, strict=True):
        tile[:bits, : p.shape[1]] = p
    return found


def sign_features(
    v: Tensor, padded: Tensor, tile_size: int, hash_length: int, norm_scale: Tensor, limit: int, stride: Pair
) -> Tensor:
    """``n sign(P v)`` of every hashed pixel: float[n, t * k, oh, ow], in the type of v.

    Args:
        v: float[n, c, h, w], whole numbers, channels-last.
        padded: as ``padded_projections`` gives it.
        tile_size: channels in a tile.
        hash_length: k.
        norm_scale: float32[].
        limit: the greatest norm.
        stride: between hashed pixels.
    """
    v = v.contiguous(memory_format=torch.channels_last)
    (n, c, h, w), (tiles, bits, size) = v.shape, padded.shape
    rows, columns = (h - 1) // stride[0] + 1, (w - 1) // stride[1] + 1
    features = _empty((n, tiles * hash_length, rows, columns), v.dtype, v)
    positions = n * rows * columns
    pixels = max(16, min(_PIXELS, (1 << 14) // bits))
    _features_kernel[(triton.cdiv(positions, pixels), tiles)](
        features, v, padded, norm_scale, positions, rows, columns, h, w, *stride,
        c, tile_size, hash_length, tiles * hash_length,
        pixels, size, bits, float(limit),
    )  # fmt: skip
    return features


def add_lengthwise(
    grad_v: Tensor, v: Tensor, exact: Tensor, on_line: Tensor, grad: Tensor, kernel: Pair, stride: Pair, dilation: Pair
) -> Tensor:
    """``grad_v`` with the gradient of what answers are beyond the line; see ``hash_product``.

    Args:
        grad_v: float[n, c, h, w], towards v through the line; overwritten where it is channels-last.
        v: float[n, c, h, w], whole numbers.
        exact, on_line, grad: float[n, o, oh, ow].
        kernel, stride, dilation: of the line.
    """
    grad_v, v, exact, on_line, grad = (
        part.contiguous(memory_format=torch.channels_last) for part in (grad_v, v, exact, on_line, grad)
    )
    (n, c, h, w), (_, o, oh, ow) = v.shape, exact.shape
    energy, share = v.new_empty(n * h * w, dtype=torch.float32), v.new_empty(n * oh * ow, dtype=torch.float32)
    pixels, positions, wide = n * h * w, n * oh * ow, triton.next_power_of_2(c)
    at_once = max(8, min(_PIXELS, 8192 // max(wide, triton.next_power_of_2(o))))
    _energy_kernel[(triton.cdiv(pixels, at_once),)](energy, v, pixels, c, at_once, wide)
    _share_kernel[(triton.cdiv(positions, at_once),)](
        share, exact, on_line, grad, energy, positions, oh, ow, h, w, *stride, *dilation, o,
        *kernel, at_once, triton.next_power_of_2(o),
    )  # fmt: skip
    _spread_kernel[(triton.cdiv(pixels, at_once),)](
        grad_v, v, share, pixels, h, w, oh, ow, *stride, *dilation, c, *kernel, at_once, wide
    )
    return grad_v


def _empty(shape: tuple[int, ...], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """Memory for images, channels-last."""
    return torch.empty(shape, dtype=dtype, device=beside.device, memory_format=torch.channels_last)
