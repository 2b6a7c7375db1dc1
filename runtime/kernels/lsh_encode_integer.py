"""``LshEncodeInteger``: projection, sign, packing and norm of quantised windows.

Bits lie in the lanes, so a projection is one chain of byte products over the tile's features, four at
a time; codes stay in registers until they are packed. A byte x of an image stands for the quantised
value q = x - zero, and what is subtracted is the same for every position: it is what a chain starts
with, ``start = -P (centre + zero)``. Everything but the norm's root is a whole number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from runtime.kernels.integer_norms import write_norms
from runtime.kernels.integers import (
    and_words,
    broadcast16,
    broadcast32,
    broadcast64,
    dot_bytes,
    nonnegative_bits,
    subtract_words,
    sum_of_squares,
    sum_words,
    widen_bytes,
)
from runtime.kernels.memory import bytes_at, int16_at, int32_at, intp_at, make_record
from runtime.kernels.native import native
from runtime.kernels.vectors import add_words, load16, load32, load64, store_bits
from runtime.kernels.windows import copy_bytes, gather_bytes, gather_bytes_to_slots

WINDOWS = 4  # windows that share each load of the projection
LONGEST_RUN = 256  # windows whose squared norms are kept before they are finished
READ_BEYOND = 16  # bytes that may be read after an image, and written after windows in the scratch

# Fields of the record; the first ones are addresses.
ARGUMENTS = np.dtype(
    [
        ("x", np.intp),  # uint8[n, h, w, c]
        ("zeros", np.intp),  # uint8[kw * c], the byte of a pad
        ("slots", np.intp),  # intp[kh * kw * c], place of each feature in the scratch; 0 where they lie in order
        ("projection", np.intp),  # int32[t, fours, lanes]: four features of a bit in a lane
        ("start", np.intp),  # int32[t, lanes]; -1 for an absent bit
        ("centre", np.intp),  # int16[t, sixteens * 16], centre + zero
        ("present", np.intp),  # int16[t, sixteens * 16], -1 where a feature exists, else 0
        ("ring_codes", np.intp),  # uint8[ow, t * B], of pad pixels; 0 where a window has several taps
        ("ring_norms", np.intp),  # uint8[ow, t * repeat]
        ("ring_sums", np.intp),  # int32[ow]
        ("scratch", np.intp),  # uint8[slots, 4 * f + 16 or more], f features of a window
        ("squares", np.intp),  # int32[slots, run * t + 16], squared norms
        ("codes", np.intp),  # uint8[n, oh, ow, t, B], written
        ("norms", np.intp),  # uint8[n, oh, ow, t, repeat], written
        ("sums", np.intp),  # int32[n, oh, ow], written: sum of the tiles' norms
        ("h", np.intp),
        ("w", np.intp),
        ("c", np.intp),
        ("oh", np.intp),
        ("ow", np.intp),
        ("kh", np.intp),
        ("kw", np.intp),
        ("sy", np.intp),
        ("sx", np.intp),
        ("dy", np.intp),
        ("dx", np.intp),
        ("top", np.intp),
        ("left", np.intp),
        ("features", np.intp),  # f
        ("tile_size", np.intp),
        ("tiles", np.intp),
        ("fours", np.intp),  # of features in a tile, rounded up
        ("sixteens", np.intp),  # alike
        ("lanes", np.intp),  # k, rounded up to a multiple of 16
        ("code", np.intp),  # B
        ("repeat", np.intp),  # bytes of a norm
        ("scratch_row", np.intp),  # bytes of one slot
        ("squares_row", np.intp),  # numbers of one slot
        ("norm_scale", np.float64),
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


@native
def lsh_encode_integer(arguments: int, begin: int, end: int, slot: int) -> None:
    """Hashes the positions begin..end of the flattened [n, oh, ow]; see ``ARGUMENTS``."""
    p = _arguments_at(arguments)
    image, rest = divmod(begin, p.oh * p.ow)
    oy, ox = divmod(rest, p.ow)
    position = begin
    while position < end:
        # A part of a row, in three runs: pads, windows, pads.
        stop = min(end, position + p.ow - ox, position + LONGEST_RUN)
        first, last = position, stop
        if p.ring_codes:
            row = position - ox
            first = min(stop, max(position, row + (p.left + p.sx - 1) // p.sx))
            last = max(first, min(stop, row + (p.w - 1 + p.left) // p.sx + 1))
            if not 0 <= oy * p.sy - p.top < p.h:
                first = last = stop
            _copy_ring(p, position, first)
            _copy_ring(p, last, stop)
        _encode_run(p, image, oy, ox + first - position, first, last, slot)
        ox += stop - position
        position = stop
        if ox == p.ow:
            ox = 0
            oy += 1
            if oy == p.oh:
                oy = 0
                image += 1


@njit(inline="always")
def _copy_ring(p: Any, begin: int, end: int) -> None:
    if begin < end:
        codes, norms, sums = bytes_at(p.codes), bytes_at(p.norms), int32_at(p.sums)
        ring_codes, ring_norms, ring_sums = bytes_at(p.ring_codes), bytes_at(p.ring_norms), int32_at(p.ring_sums)
        code, norm = p.tiles * p.code, p.tiles * p.repeat
        copy_bytes(ring_codes, 0, codes, begin * code, (end - begin) * code)
        copy_bytes(ring_norms, 0, norms, begin * norm, (end - begin) * norm)
        for i in range(end - begin):
            sums[begin + i] = ring_sums[i]


@njit(inline="always")
def _encode_run(p: Any, image: int, oy: int, ox: int, first: int, last: int, slot: int) -> None:
    """Hashes the windows first..last of one row, of which the first is in column ``ox``."""
    x, zeros, scratch = bytes_at(p.x), bytes_at(p.zeros), bytes_at(p.scratch + slot * p.scratch_row)
    squares = int32_at(p.squares + 4 * slot * p.squares_row)
    tiles, features = p.tiles, p.features
    one_tap = p.kh * p.kw == 1 and p.slots == 0
    source = x if one_tap else scratch
    for at in range(first, last, 4):
        # Beyond the run, its last window is computed again: the same bits to the same place.
        p1, p2, p3 = min(at + 1, last - 1), min(at + 2, last - 1), min(at + 3, last - 1)
        if one_tap:
            pixel = (image * p.h + oy * p.sy - p.top) * p.w - p.left
            w0 = (pixel + (ox + at - first) * p.sx) * p.c
            w1 = (pixel + (ox + p1 - first) * p.sx) * p.c
            w2 = (pixel + (ox + p2 - first) * p.sx) * p.c
            w3 = (pixel + (ox + p3 - first) * p.sx) * p.c
        else:
            w0, w1, w2, w3 = 0, features, 2 * features, 3 * features
            for lane in range(4):
                column = ox + min(at + lane, last - 1) - first
                if p.slots:
                    gather_bytes_to_slots(
                        x, bytes_at(p.zeros), intp_at(p.slots), p, image, oy, column, scratch, lane * features
                    )
                else:
                    gather_bytes(x, zeros, p, image, oy, column, scratch, lane * features)
        for tile in range(tiles):
            offset = tile * p.tile_size
            to = tile - first * tiles
            squares[at * tiles + to] = _energy(p, source, w0 + offset, tile)
            squares[p1 * tiles + to] = _energy(p, source, w1 + offset, tile)
            squares[p2 * tiles + to] = _energy(p, source, w2 + offset, tile)
            squares[p3 * tiles + to] = _energy(p, source, w3 + offset, tile)
            u0, u1, u2, u3 = at * tiles + tile, p1 * tiles + tile, p2 * tiles + tile, p3 * tiles + tile
            _project(p, source, w0 + offset, w1 + offset, w2 + offset, w3 + offset, tile, u0, u1, u2, u3)
    write_norms(p, squares, first, last)


@njit(inline="always")
def _energy(p: Any, source: Any, at: int, tile: int) -> Any:
    """Squared norm of one tile."""
    centre, present = int16_at(p.centre), int16_at(p.present)
    row = tile * p.sixteens * 16
    total = _squares(source, at, centre, present, row)
    for i in range(16, p.sixteens * 16, 16):
        total = add_words(total, _squares(source, at + i, centre, present, row + i))
    return sum_words(total)


@njit(inline="always")
def _squares(source: Any, at: int, centre: Any, present: Any, row: int) -> Any:
    v = subtract_words(widen_bytes(load16(source, at)), load16(centre, row))
    return sum_of_squares(and_words(v, load16(present, row)))


@njit(inline="always")
def _project(
    p: Any, source: Any, w0: int, w1: int, w2: int, w3: int, tile: int, u0: int, u1: int, u2: int, u3: int
) -> None:
    """Writes one tile's codes of four windows, 64 bits at a time, then 32, then 16; u0..u3 number the codes."""
    projection, start = int32_at(p.projection), int32_at(p.start)
    codes = bytes_at(p.codes)
    width, code, fours = p.lanes, p.code, p.fours
    first, row = tile * width, tile * fours * width
    bit = 0
    while bit + 64 <= width:
        a0 = load64(start, first + bit)
        a1, a2, a3 = a0, a0, a0
        at = row + bit
        for j in range(0, 4 * fours, 4):
            r = load64(projection, at)
            a0 = dot_bytes(a0, broadcast64(source, w0 + j), r)
            a1 = dot_bytes(a1, broadcast64(source, w1 + j), r)
            a2 = dot_bytes(a2, broadcast64(source, w2 + j), r)
            a3 = dot_bytes(a3, broadcast64(source, w3 + j), r)
            at += width
        to = bit // 8
        _store_code(codes, u0 * code + to, nonnegative_bits(a0), code - to, 8)
        _store_code(codes, u1 * code + to, nonnegative_bits(a1), code - to, 8)
        _store_code(codes, u2 * code + to, nonnegative_bits(a2), code - to, 8)
        _store_code(codes, u3 * code + to, nonnegative_bits(a3), code - to, 8)
        bit += 64
    if bit + 32 <= width:
        b0 = load32(start, first + bit)
        b1, b2, b3 = b0, b0, b0
        at = row + bit
        for j in range(0, 4 * fours, 4):
            s = load32(projection, at)
            b0 = dot_bytes(b0, broadcast32(source, w0 + j), s)
            b1 = dot_bytes(b1, broadcast32(source, w1 + j), s)
            b2 = dot_bytes(b2, broadcast32(source, w2 + j), s)
            b3 = dot_bytes(b3, broadcast32(source, w3 + j), s)
            at += width
        to = bit // 8
        _store_code(codes, u0 * code + to, nonnegative_bits(b0), code - to, 4)
        _store_code(codes, u1 * code + to, nonnegative_bits(b1), code - to, 4)
        _store_code(codes, u2 * code + to, nonnegative_bits(b2), code - to, 4)
        _store_code(codes, u3 * code + to, nonnegative_bits(b3), code - to, 4)
        bit += 32
    if bit < width:
        c0 = load16(start, first + bit)
        c1, c2, c3 = c0, c0, c0
        at = row + bit
        for j in range(0, 4 * fours, 4):
            t = load16(projection, at)
            c0 = dot_bytes(c0, broadcast16(source, w0 + j), t)
            c1 = dot_bytes(c1, broadcast16(source, w1 + j), t)
            c2 = dot_bytes(c2, broadcast16(source, w2 + j), t)
            c3 = dot_bytes(c3, broadcast16(source, w3 + j), t)
            at += width
        to = bit // 8
        _store_code(codes, u0 * code + to, nonnegative_bits(c0), code - to, 2)
        _store_code(codes, u1 * code + to, nonnegative_bits(c1), code - to, 2)
        _store_code(codes, u2 * code + to, nonnegative_bits(c2), code - to, 2)
        _store_code(codes, u3 * code + to, nonnegative_bits(c3), code - to, 2)


@njit(inline="always")
def _store_code(codes: Any, to: int, bits: Any, left: int, size: int) -> None:
    """Writes ``size`` bytes of a code, or the ``left`` ones that remain of it."""
    if left >= size:
        store_bits(codes, to, bits)
    else:
        for i in range(left):
            codes[to + i] = np.uint8(bits & 255)
            bits = bits >> 8
