"""``LshConvInteger``: XOR, popcount and byte products, sixteen outputs at a time.

For a position p and sixteen outputs in the lanes, over the terms q,

    acc += sum over four bytes of norm[p, q] * popcount(code[p, q] ^ weight[q])
    Y = clip(scale * (k * sum of norms - 2 acc) + bias + residual)

Where a weight's code has several planes of bits, each counts twice as much as the one after it: ``acc`` is doubled
between planes, and ``k`` stands for the sum of what they count.

A term is four bytes of code, or ``group`` times four that share a norm. Its bytes are a run of memory:
where taps lie side by side, a run goes on from tile to tile and from tap to tap, so a code of 8 or 16
bits fills its share of a term and no more. Where a run ends within four bytes, a mask stops it.

Up to ``acc`` everything is a whole number below 2^24, exact in any order. Four positions share each
load of weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.integer_epilogue import EPILOGUE, finish, finish_plain, is_plain, load_epilogue
from runtime.kernels.integers import add_bytes, and_words, broadcast16, dot_counts, popcount_bytes, to_float32, zeros16
from runtime.kernels.memory import bytes_at, float32_at, int32_at, intp_at, make_record
from runtime.kernels.native import native
from runtime.kernels.vectors import add_words, load16, mul, splat16, store_first, xor

MOST_FOURS = 8  # of bytes in a term: their counts of 8 bits each stay within 64, see ``dot_counts``

# Fields of the record; the first ones are addresses.
ARGUMENTS = np.dtype(
    [
        ("codes", np.intp),  # uint8[pixels, tiles * B]
        ("norms", np.intp),  # uint8[pixels, tiles * B / group]: each tile's norm, repeated
        ("sums", np.intp),  # int32[pixels], sum of the tiles' norms
        ("weights", np.intp),  # int32[blocks, planes, terms, group, 16]; a block is sixteen outputs
        ("offsets", np.intp),  # intp[terms], bytes of norms from a position's first pixel to a term
        ("masks", np.intp),  # int32[terms], bytes of a term that count; read where group is 1
        ("taps", np.intp),  # intp[kh * kw], pixels from a position's first to a tap's
        ("starts", np.intp),  # intp[oh * ow], bytes of norms from an image's first pixel to a position's
        ("halves", np.intp),  # float32[positions], scratch: k / 2 times a position's sum of norms
        ("terms", np.intp),
        ("tap_count", np.intp),
        ("area", np.intp),  # oh * ow
        ("row", np.intp),  # ow
        ("stride", np.intp),  # pixels from a position to the next in its row
        ("image", np.intp),  # bytes of norms of one image
        ("pixel", np.intp),  # bytes of norms of one pixel
        ("half_length", np.float32),  # k / 2, times what all planes count
        *EPILOGUE,
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


@cache
def lsh_conv_integer(group: int, planes: int) -> int:
    """Address of the kernel for terms of ``group`` times four bytes and so many planes."""

    @native
    def lsh_conv_integer_kernel(arguments: int, begin: int, end: int, slot: int) -> None:
        p = _arguments_at(arguments)
        _sum_norms(p, begin, end)
        _convolve(p, begin, end, group, planes)

    return lsh_conv_integer_kernel()


@inlined
def _sum_norms(p: Any, begin: int, end: int) -> None:
    """Half of k times each position's sum of norms, over taps and tiles; exact, as it is below 2^23."""
    sums, taps, starts, halves = int32_at(p.sums), intp_at(p.taps), intp_at(p.starts), float32_at(p.halves)
    area, row, stride, tap_count, half = p.area, p.row, p.stride, p.tap_count, p.half_length
    factor = splat16(half)
    image, rest = divmod(begin, area)
    base = image * p.image
    position = begin
    while position < end:
        run = min(end - position, row - rest % row)
        first = (base + starts[rest]) // p.pixel
        if stride == 1:
            for x in range(0, run, 16):
                total = load16(sums, first + x + taps[0])
                for tap in range(1, tap_count):
                    total = add_words(total, load16(sums, first + x + taps[tap]))
                store_first(halves, position + x, mul(to_float32(total), factor), min(16, run - x))
        else:
            for x in range(run):
                count = np.int32(0)
                for tap in range(tap_count):
                    count += sums[first + x * stride + taps[tap]]
                halves[position + x] = np.float32(count) * half
        position += run
        rest += run
        if rest == area:
            rest = 0
            base += p.image


@inlined
def _convolve(p: Any, begin: int, end: int, group: int, planes: int) -> None:
    codes, norms, weights = bytes_at(p.codes), bytes_at(p.norms), int32_at(p.weights)
    offsets, masks, starts, halves = intp_at(p.offsets), int32_at(p.masks), intp_at(p.starts), float32_at(p.halves)
    terms, area, outputs, image = p.terms, p.area, p.outputs, p.image
    e = load_epilogue(p)
    plain = is_plain(e)
    number, rest = divmod(begin, area)
    base = number * p.image
    position = begin
    while position < end:
        # Beyond the image or the end, the last position is computed again: the same bits to the same place.
        last = min(area - rest, end - position) - 1
        i1, i2, i3 = min(1, last), min(2, last), min(3, last)
        u0, u1 = base + starts[rest], base + starts[rest + i1]
        u2, u3 = base + starts[rest + i2], base + starts[rest + i3]
        weight = 0
        for first in range(0, outputs, 16):
            a0 = zeros16()
            a1, a2, a3 = a0, a0, a0
            for plane in range(planes):
                if plane:
                    a0, a1, a2, a3 = add_words(a0, a0), add_words(a1, a1), add_words(a2, a2), add_words(a3, a3)
                for q in range(terms):
                    at, mask = offsets[q], masks[q]
                    a0 = _add_term(a0, codes, norms, u0 + at, weights, weight, mask, group)
                    a1 = _add_term(a1, codes, norms, u1 + at, weights, weight, mask, group)
                    a2 = _add_term(a2, codes, norms, u2 + at, weights, weight, mask, group)
                    a3 = _add_term(a3, codes, norms, u3 + at, weights, weight, mask, group)
                    weight += 16 * group
            if plain:
                finish_plain(e, halves, a0, a1, a2, a3, position, i1, i2, i3, first)
            else:
                finish(e, halves, a0, a1, a2, a3, position, i1, i2, i3, first)
        step = min(4, last + 1)
        position += step
        rest += step
        if rest == area:
            rest = 0
            base += image


@inlined
def _add_term(total: Any, codes: Any, norms: Any, unit: int, weights: Any, weight: int, mask: Any, group: int) -> Any:
    """Adds the distances of one term, times its norms."""
    at = unit * group
    different = xor(broadcast16(codes, at), load16(weights, weight))
    if group == 1:
        different = and_words(different, splat16(mask))
    count = popcount_bytes(different)
    for i in range(1, group):
        more = xor(broadcast16(codes, at + 4 * i), load16(weights, weight + 16 * i))
        count = add_bytes(count, popcount_bytes(more))
    return dot_counts(total, broadcast16(norms, unit), count)
