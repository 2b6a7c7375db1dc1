"""``LshEncode``: projection, sign, packing and norm of four windows at a time.

Bits lie in the lanes, so each projection is one chain of fused multiply-adds in float32 over the
tile's features. Where the sum is within its rounding error of 0, which is where float32 may give
another sign than float64, the bit is settled in float64. Norms are float64 sums, rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from runtime.kernels.compiling import compiled, helper
from runtime.kernels.vectors import (
    bits_below,
    fma,
    load16,
    load16_first,
    load32,
    load64,
    magnitude,
    minimum,
    sign_bits,
    splat16,
    splat32,
    splat64,
    store_bits,
    sum_lanes,
    widen,
)
from runtime.kernels.windows import copy_minus, gather, gather_to_slots

WINDOWS = 4  # windows that share each load of the projection


@compiled
def lsh_encode(
    x: Any,
    centre: Any,
    projection: Any,
    start: Any,
    margin: Any,
    slots: Any,
    zeros: Any,
    ring_codes: Any,
    ring_norms: Any,
    window: Any,
    tile_size: int,
    scratch: Any,
    codes: Any,
    norms: Any,
    begin: int,
    end: int,
    slot: int,
) -> None:
    """Hashes the positions begin..end of the flattened [n, oh, ow].

    Args:
        x: float32[n * h * w * c], channels-last.
        centre: float32[kw * c], repeated for each column of the window.
        projection: float32[t * tile_size * 32 W], bit fastest; absent features and bits are 0.
        start: float32[32 W], what a projection's sum starts with: 0, or -1 for an absent bit.
        margin: float32[t], bound of a projection's rounding error for a window of norm 1.
        slots: intp[kh * kw * c], place of each feature in a window's scratch; empty where the
            features lie in order.
        zeros: float32[c], zeros.
        ring_codes: uint32[t * W] of a pad pixel, or empty where a window has several taps.
        ring_norms: float32[t] of a pad pixel.
        window: ``Window``.
        tile_size: features in one tile.
        scratch: float32[slots, 4 * f + 16], f features of a window.
        codes: uint32[n * oh * ow * t * W], written.
        norms: float32[n * oh * ow * t], written.
        begin: first position.
        end: position after the last.
        slot: row of ``scratch`` to use.
    """
    features = window.kh * window.kw * window.c
    tiles = ring_norms.size
    buffer = scratch[slot]
    image, rest = divmod(begin, window.oh * window.ow)
    oy, ox = divmod(rest, window.ow)
    position = begin
    while position < end:
        # One row, in three runs: pads, windows, pads.
        stop = min(end, position + window.ow - ox)
        first, last = position, stop
        if ring_codes.size:
            row = position - ox
            first = min(stop, max(position, row + (window.left + window.sx - 1) // window.sx))
            last = max(first, min(stop, row + (window.w - 1 + window.left) // window.sx + 1))
            if not 0 <= oy * window.sy - window.top < window.h:
                first = last = stop
            _fill_ring(ring_codes, ring_norms, position, first, codes, norms)
            _fill_ring(ring_codes, ring_norms, last, stop, codes, norms)
        for at in range(first, last, 4):
            # Beyond the run, its last window is computed again: the same bits to the same place.
            for lane in range(4):
                column = ox + min(at + lane, last - 1) - position
                _load_window(x, zeros, centre, slots, window, image, oy, column, buffer, lane * features)
            p1, p2, p3 = min(at + 1, last - 1), min(at + 2, last - 1), min(at + 3, last - 1)
            for tile in range(tiles):
                offset = tile * tile_size
                count = min(tile_size, features - offset)
                u0, u1, u2, u3 = at * tiles + tile, p1 * tiles + tile, p2 * tiles + tile, p3 * tiles + tile
                norms[u0] = _norm(buffer, offset, count)
                norms[u1] = _norm(buffer, offset + features, count)
                norms[u2] = _norm(buffer, offset + 2 * features, count)
                norms[u3] = _norm(buffer, offset + 3 * features, count)
                _project(projection, start, margin[tile], offset, count, features, buffer, norms, u0, u1, u2, u3, codes)
        position = stop
        ox = 0
        oy += 1
        if oy == window.oh:
            oy = 0
            image += 1


@njit(inline="always")
def _fill_ring(ring_codes: Any, ring_norms: Any, begin: int, end: int, codes: Any, norms: Any) -> None:
    for position in range(begin, end):
        for i in range(ring_codes.size):
            codes[position * ring_codes.size + i] = ring_codes[i]
        for i in range(ring_norms.size):
            norms[position * ring_norms.size + i] = ring_norms[i]


@njit(inline="always")
def _load_window(
    x: Any, zeros: Any, centre: Any, slots: Any, window: Any, image: int, oy: int, ox: int, buffer: Any, to: int
) -> None:
    """Copies a window, minus the centre, to ``buffer[to:]``."""
    if slots.size:
        gather_to_slots(x, centre, slots, window, image, oy, ox, buffer, to)
    elif window.kh * window.kw == 1:
        pixel = (image * window.h + oy * window.sy - window.top) * window.w + ox * window.sx - window.left
        copy_minus(x, pixel * window.c, centre, window.c, buffer, to)
    else:
        gather(x, zeros, centre, window, image, oy, ox, 0, window.c, buffer, to)


@njit(inline="always")
def _norm(buffer: Any, offset: int, count: int) -> Any:
    """Euclidean norm of ``buffer[offset : offset + count]``."""
    total = splat16(0.0)
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        v = widen(load16(buffer, offset + i))
        total = fma(v, v, total)
    if whole < count:
        rest = widen(load16_first(buffer, offset + whole, count - whole))
        total = fma(rest, rest, total)
    return np.float32(math.sqrt(sum_lanes(total)))


@njit(inline="always")
def _project(
    projection: Any,
    start: Any,
    margin: float,
    offset: int,
    count: int,
    step: int,
    buffer: Any,
    norms: Any,
    u0: int,
    u1: int,
    u2: int,
    u3: int,
    codes: Any,
) -> None:
    """Writes one tile's codes of four windows, 64 bits at a time, then 32; u0..u3 number the codes."""
    width = start.size
    words = width // 32
    limit = margin * max(max(norms[u0], norms[u1]), max(norms[u2], norms[u3]))  # of all four, to ask once
    bit = 0
    while bit + 64 <= width:
        a0 = load64(start, bit)
        a1, a2, a3 = a0, a0, a0
        row = offset * width + bit
        for j in range(offset, offset + count):
            p = load64(projection, row)
            a0 = fma(splat64(buffer[j]), p, a0)
            a1 = fma(splat64(buffer[j + step]), p, a1)
            a2 = fma(splat64(buffer[j + 2 * step]), p, a2)
            a3 = fma(splat64(buffer[j + 3 * step]), p, a3)
            row += width
        word = bit // 32
        store_bits(codes, u0 * words + word, sign_bits(a0))
        store_bits(codes, u1 * words + word, sign_bits(a1))
        store_bits(codes, u2 * words + word, sign_bits(a2))
        store_bits(codes, u3 * words + word, sign_bits(a3))
        least = minimum(minimum(magnitude(a0), magnitude(a1)), minimum(magnitude(a2), magnitude(a3)))
        if bits_below(least, limit):
            c0, c1 = bits_below(a0, margin * norms[u0]), bits_below(a1, margin * norms[u1])
            c2, c3 = bits_below(a2, margin * norms[u2]), bits_below(a3, margin * norms[u3])
            _settle(projection, start, offset, count, buffer, 0, bit, c0, codes, u0 * words)
            _settle(projection, start, offset, count, buffer, step, bit, c1, codes, u1 * words)
            _settle(projection, start, offset, count, buffer, 2 * step, bit, c2, codes, u2 * words)
            _settle(projection, start, offset, count, buffer, 3 * step, bit, c3, codes, u3 * words)
        bit += 64
    if bit < width:
        b0 = load32(start, bit)
        b1, b2, b3 = b0, b0, b0
        row = offset * width + bit
        for j in range(offset, offset + count):
            r = load32(projection, row)
            b0 = fma(splat32(buffer[j]), r, b0)
            b1 = fma(splat32(buffer[j + step]), r, b1)
            b2 = fma(splat32(buffer[j + 2 * step]), r, b2)
            b3 = fma(splat32(buffer[j + 3 * step]), r, b3)
            row += width
        store_bits(codes, u0 * words + words - 1, sign_bits(b0))
        store_bits(codes, u1 * words + words - 1, sign_bits(b1))
        store_bits(codes, u2 * words + words - 1, sign_bits(b2))
        store_bits(codes, u3 * words + words - 1, sign_bits(b3))
        least = minimum(minimum(magnitude(b0), magnitude(b1)), minimum(magnitude(b2), magnitude(b3)))
        if bits_below(least, limit):
            d0, d1 = bits_below(b0, margin * norms[u0]), bits_below(b1, margin * norms[u1])
            d2, d3 = bits_below(b2, margin * norms[u2]), bits_below(b3, margin * norms[u3])
            _settle(projection, start, offset, count, buffer, 0, bit, np.uint64(d0), codes, u0 * words)
            _settle(projection, start, offset, count, buffer, step, bit, np.uint64(d1), codes, u1 * words)
            _settle(projection, start, offset, count, buffer, 2 * step, bit, np.uint64(d2), codes, u2 * words)
            _settle(projection, start, offset, count, buffer, 3 * step, bit, np.uint64(d3), codes, u3 * words)


@helper
def _settle(
    projection: Any,
    start: Any,
    offset: int,
    count: int,
    buffer: Any,
    step: int,
    first: int,
    chosen: Any,
    codes: Any,
    unit: int,
) -> None:
    """Decides the bits ``first + i`` of one code, for every set bit i of ``chosen``, in float64."""
    width = start.size
    bit = first
    while chosen:
        if chosen & np.uint64(1) and start[bit] == 0:
            total = 0.0
            for j in range(offset, offset + count):
                total += np.float64(buffer[j + step]) * np.float64(projection[j * width + bit])
            mask = np.uint32(1) << np.uint32(bit % 32)
            word = unit + bit // 32
            codes[word] = codes[word] | mask if total >= 0 else codes[word] & ~mask
        chosen >>= np.uint64(1)
        bit += 1
