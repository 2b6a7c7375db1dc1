"""Depthwise convolution: one filter for each channel, sixteen channels at a time.

Each output is one chain of fused multiply-adds in float32 that starts with the bias and runs over
(ky, kx); taps that lie on a pad are left out.
"""

from __future__ import annotations

from typing import Any

from runtime.kernels.compiling import compiled
from runtime.kernels.epilogue import finish16
from runtime.kernels.vectors import fma, load16, load16_first


@compiled
def depthwise(
    x: Any,
    weights: Any,
    bias: Any,
    residual: Any,
    window: Any,
    low: float,
    high: float,
    out: Any,
    begin: int,
    end: int,
) -> None:
    """Computes the positions begin..end of the flattened output [n, oh, ow, c].

    Args:
        x: float32[n * h * w * c], channels-last.
        weights: float32[kh * kw, ceil16(c)], flat.
        bias: float32[ceil16(c)].
        residual: float32[n * oh * ow * c], or empty.
        window: ``Window``.
        low: least value.
        high: greatest value.
        out: float32[n * oh * ow * c], written.
        begin: first position.
        end: position after the last.
    """
    image, rest = divmod(begin, window.oh * window.ow)
    oy, ox = divmod(rest, window.ow)
    for position in range(begin, end):
        for first in range(0, window.c, 16):
            lanes = min(16, window.c - first)
            total = load16(bias, first)
            for ky in range(window.kh):
                y = oy * window.sy + ky * window.dy - window.top
                if 0 <= y < window.h:
                    for kx in range(window.kw):
                        column = ox * window.sx + kx * window.dx - window.left
                        if 0 <= column < window.w:
                            at = ((image * window.h + y) * window.w + column) * window.c + first
                            pixel = load16_first(x, at, lanes)
                            total = fma(pixel, load16(weights, (ky * window.kw + kx) * bias.size + first), total)
            finish16(total, residual, position * window.c + first, lanes, low, high, out)
        ox += 1
        if ox == window.ow:
            ox = 0
            oy += 1
            if oy == window.oh:
                oy = 0
                image += 1
