"""``LshConv``: XOR, popcount, table look-up and multiply-add, sixteen outputs at a time.

For a position p and sixteen outputs in the lanes, over the terms q = (ky, kx, tile) in that order,

    acc = fma(norm[p, q] * weight_norm[q], table[popcount(code[p, q] ^ weight[q])], acc)
    Y = min(max(scale * acc + bias + residual, clip_min), clip_max)

in float64, rounded to float32 where it is stored. Four positions share each load of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from runtime.kernels.compiling import compiled
from runtime.kernels.epilogue import finish_exact16
from runtime.kernels.positions import next_position
from runtime.kernels.tables import lookup, word_count
from runtime.kernels.vectors import add_words, fma, load16, mul, popcount, splat16, widen, xor

_MOST_WORDS = 8  # 256 bits: a longer code has a table that no register file holds


def code_width(words: int) -> tuple[int, ...] | int:
    """The argument ``width`` of ``lsh_conv`` for codes of ``words`` 32-bit words.

    The kernel is compiled once for each length of the tuple, and once for all longer codes.
    """
    return (0,) * words if words <= _MOST_WORDS else words


@njit(inline="always")
def _distances(codes: Any, code: int, weights: Any, weight: int, words: int) -> Any:
    """Hamming distances of one code to sixteen: uint32 lanes, in bits."""
    count = popcount(xor(splat16(codes[code]), load16(weights, weight)))
    for word in range(1, words):
        count = add_words(count, popcount(xor(splat16(codes[code + word]), load16(weights, weight + word * 16))))
    return count


@compiled
def lsh_conv(
    codes: Any,
    norms: Any,
    weights: Any,
    weight_norms: Any,
    table: Any,
    scale: Any,
    bias: Any,
    residual: Any,
    offsets: Any,
    starts: Any,
    image: int,
    outputs: int,
    width: Any,
    low: float,
    high: float,
    out: Any,
    begin: int,
    end: int,
) -> None:
    """Computes the positions begin..end of the flattened output [n, oh, ow, o].

    Args:
        codes: uint32[units * W]; a unit is one tile of one pixel.
        norms: float32[units].
        weights: uint32[blocks, q, W, 16], flat; a block is sixteen outputs.
        weight_norms: float64[blocks, q, 16], flat; 0 where an output does not exist.
        table: float32[32 W + 1 or more].
        scale: float64[blocks * 16].
        bias: float64[blocks * 16].
        residual: float32[n * oh * ow * o], or empty.
        offsets: intp[q], units from a position's first unit to a term's.
        starts: intp[oh * ow], units from an image's first to a position's.
        image: units of one image.
        outputs: o.
        width: W, see ``code_width``.
        low: clip_min, float64.
        high: clip_max, float64.
        out: float32[n * oh * ow * o], written.
        begin: first position.
        end: position after the last.
    """
    words = word_count(width)
    terms = offsets.size
    base, rest = divmod(begin, starts.size)
    base *= image
    for p0 in range(begin, end, 4):
        # Beyond the end, the last position is computed again: the same bits to the same place.
        s0 = base + starts[rest]
        p1, base, rest = next_position(p0, end, base, rest, starts.size, image)
        s1 = base + starts[rest]
        p2, base, rest = next_position(p1, end, base, rest, starts.size, image)
        s2 = base + starts[rest]
        p3, base, rest = next_position(p2, end, base, rest, starts.size, image)
        s3 = base + starts[rest]
        for first in range(0, outputs, 16):
            a0 = splat16(0.0)
            a1, a2, a3 = a0, a0, a0
            unit = first // 16 * terms
            for q in range(terms):
                at = offsets[q]
                share = load16(weight_norms, (unit + q) * 16)
                weight = (unit + q) * words * 16
                d0 = _distances(codes, (s0 + at) * words, weights, weight, words)
                d1 = _distances(codes, (s1 + at) * words, weights, weight, words)
                d2 = _distances(codes, (s2 + at) * words, weights, weight, words)
                d3 = _distances(codes, (s3 + at) * words, weights, weight, words)
                a0 = fma(mul(splat16(np.float64(norms[s0 + at])), share), widen(lookup(table, d0, width)), a0)
                a1 = fma(mul(splat16(np.float64(norms[s1 + at])), share), widen(lookup(table, d1, width)), a1)
                a2 = fma(mul(splat16(np.float64(norms[s2 + at])), share), widen(lookup(table, d2, width)), a2)
                a3 = fma(mul(splat16(np.float64(norms[s3 + at])), share), widen(lookup(table, d3, width)), a3)
            count = min(16, outputs - first)
            finish_exact16(a0, scale, bias, first, residual, p0 * outputs + first, count, low, high, out)
            finish_exact16(a1, scale, bias, first, residual, p1 * outputs + first, count, low, high, out)
            finish_exact16(a2, scale, bias, first, residual, p2 * outputs + first, count, low, high, out)
            finish_exact16(a3, scale, bias, first, residual, p3 * outputs + first, count, low, high, out)
        _, base, rest = next_position(p3, end, base, rest, starts.size, image)
