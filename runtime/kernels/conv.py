"""Float convolution and matrix product: four windows by thirty-two outputs at a time.

Each output is one chain of fused multiply-adds in float32 that starts with the bias and runs over
the features in the order (ky, kx, channel).
"""

from __future__ import annotations

from typing import Any

from numba import njit

from runtime.kernels.compiling import compiled
from runtime.kernels.epilogue import finish16
from runtime.kernels.vectors import fma, load16, splat16
from runtime.kernels.windows import gather


@compiled
def conv(
    x: Any,
    zeros: Any,
    weights: Any,
    bias: Any,
    residual: Any,
    window: Any,
    groups: int,
    outputs: int,
    low: float,
    high: float,
    scratch: Any,
    out: Any,
    begin: int,
    end: int,
    slot: int,
) -> None:
    """Computes the positions begin..end of the flattened output [n, oh, ow, o].

    Args:
        x: float32[n * h * w * c], channels-last.
        zeros: float32[kw * c], zeros.
        weights: float32[groups, blocks, f, 16], flat; a block is sixteen outputs of one group.
        bias: float32[groups, blocks, 16], flat.
        residual: float32[n * oh * ow * o], or empty.
        window: ``Window``.
        groups: groups.
        outputs: outputs of one group.
        low: least value.
        high: greatest value.
        scratch: float32[slots, 4 * f + 16], f features of a window in one group.
        out: float32[n * oh * ow * o], written.
        begin: first position.
        end: position after the last.
        slot: row of ``scratch`` to use.
    """
    channels = window.c // groups
    features = window.kh * window.kw * channels
    blocks = (outputs + 15) // 16
    buffer = scratch[slot]
    image, rest = divmod(begin, window.oh * window.ow)
    oy, ox = divmod(rest, window.ow)
    for position in range(begin, end, 4):
        count = min(4, end - position)
        first_image, first_oy, first_ox = image, oy, ox
        for group in range(groups):
            image, oy, ox = first_image, first_oy, first_ox
            for lane in range(count):
                gather(x, zeros, zeros, window, image, oy, ox, group * channels, channels, buffer, lane * features)
                ox += 1
                if ox == window.ow:
                    ox = 0
                    oy += 1
                    if oy == window.oh:
                        oy = 0
                        image += 1
            for block in range(0, blocks, 2):
                unit = group * blocks + block
                to = (position * groups + group) * outputs + block * 16
                most = outputs - block * 16
                if most > 16:
                    _two_blocks(
                        buffer,
                        weights,
                        bias,
                        features,
                        unit,
                        residual,
                        to,
                        groups * outputs,
                        count,
                        most,
                        low,
                        high,
                        out,
                    )
                else:
                    _one_block(
                        buffer,
                        weights,
                        bias,
                        features,
                        unit,
                        residual,
                        to,
                        groups * outputs,
                        count,
                        most,
                        low,
                        high,
                        out,
                    )


@njit(inline="always")
def _one_block(
    buffer: Any,
    weights: Any,
    bias: Any,
    features: int,
    unit: int,
    residual: Any,
    to: int,
    stride: int,
    count: int,
    lanes: int,
    low: float,
    high: float,
    out: Any,
) -> None:
    """Up to sixteen outputs of four windows; stores those of the first ``count``."""
    a0 = load16(bias, unit * 16)
    a1, a2, a3 = a0, a0, a0
    row = unit * features * 16
    for j in range(features):
        p = load16(weights, row + j * 16)
        a0 = fma(splat16(buffer[j]), p, a0)
        a1 = fma(splat16(buffer[features + j]), p, a1)
        a2 = fma(splat16(buffer[2 * features + j]), p, a2)
        a3 = fma(splat16(buffer[3 * features + j]), p, a3)
    finish16(a0, residual, to, lanes, low, high, out)
    if count > 1:
        finish16(a1, residual, to + stride, lanes, low, high, out)
    if count > 2:
        finish16(a2, residual, to + 2 * stride, lanes, low, high, out)
    if count > 3:
        finish16(a3, residual, to + 3 * stride, lanes, low, high, out)


@njit(inline="always")
def _two_blocks(
    buffer: Any,
    weights: Any,
    bias: Any,
    features: int,
    unit: int,
    residual: Any,
    to: int,
    stride: int,
    count: int,
    most: int,
    low: float,
    high: float,
    out: Any,
) -> None:
    """Seventeen to thirty-two outputs of four windows; stores those of the first ``count``."""
    a0, b0 = load16(bias, unit * 16), load16(bias, unit * 16 + 16)
    a1, a2, a3 = a0, a0, a0
    b1, b2, b3 = b0, b0, b0
    row = unit * features * 16
    other = row + features * 16
    for j in range(features):
        p, q = load16(weights, row + j * 16), load16(weights, other + j * 16)
        v0, v1 = splat16(buffer[j]), splat16(buffer[features + j])
        v2, v3 = splat16(buffer[2 * features + j]), splat16(buffer[3 * features + j])
        a0, b0 = fma(v0, p, a0), fma(v0, q, b0)
        a1, b1 = fma(v1, p, a1), fma(v1, q, b1)
        a2, b2 = fma(v2, p, a2), fma(v2, q, b2)
        a3, b3 = fma(v3, p, a3), fma(v3, q, b3)
    lanes = min(16, most - 16)
    finish16(a0, residual, to, 16, low, high, out)
    finish16(b0, residual, to + 16, lanes, low, high, out)
    if count > 1:
        finish16(a1, residual, to + stride, 16, low, high, out)
        finish16(b1, residual, to + stride + 16, lanes, low, high, out)
    if count > 2:
        finish16(a2, residual, to + 2 * stride, 16, low, high, out)
        finish16(b2, residual, to + 2 * stride + 16, lanes, low, high, out)
    if count > 3:
        finish16(a3, residual, to + 3 * stride, 16, low, high, out)
        finish16(b3, residual, to + 3 * stride + 16, lanes, low, high, out)
