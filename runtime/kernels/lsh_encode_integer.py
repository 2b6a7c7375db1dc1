"""``LshEncodeInteger``: projection, sign, packing and norm of quantised windows.

Bits lie in the lanes, so a projection is one chain of byte products over the tile's features, four at
a time; codes stay in registers until they are packed. A byte x of an image stands for the quantised
value q = x - zero, and what is subtracted is the same for every position, so a chain starts with it.
With the projection's sign turned, a bit is set where

    sum -P x + (P (centre + zero) - 1) < 0.

Everything but the norm's root is a whole number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from runtime.kernels.compiling import helper, inlined
from runtime.kernels.integer_norms import write_norms
from runtime.kernels.integers import broadcast, dot_bytes, load_constant, store_bytes_apart, store_shorts_apart
from runtime.kernels.memory import bytes_at, int32_at, intp_at, make_record
from runtime.kernels.narrowing import negative_bits
from runtime.kernels.native import native
from runtime.kernels.targets import target_has
from runtime.kernels.vectors import load16, store_bits, store_first
from runtime.kernels.windows import copy_bytes, gather_byte_runs

WINDOWS = 16  # windows that are gathered before they are hashed
LONGEST_RUN = 256  # windows of which the squared norms are kept before they are finished
SLACK = 16  # elements that may be read or written after an array
_KEPT = (1, 2, 4, 8, 16)  # fours of features in a tile for which there are kernels of their own,
_IN_REGISTERS = 16  # where a block of its projection fits so many registers

# Fields of the record; the first ones are addresses.
ARGUMENTS = np.dtype(
    [
        ("x", np.intp),  # uint8[n, h, w, c]
        ("zeros", np.intp),  # uint8[c], the byte of a pad
        ("runs", np.intp),  # intp[run_count, 4], see ``gather_byte_runs``; 0 where a window is a run of memory
        ("run_count", np.intp),
        ("projection", np.intp),  # int32[t, lanes / block, fours, block]: four features of a bit in a lane
        ("start", np.intp),  # int32[t, lanes / block, block]
        ("centre", np.intp),  # int16[t, sixteens * 16], centre + zero
        ("present", np.intp),  # int16[t, sixteens * 16], -1 where a feature exists, else 0
        ("pattern", np.intp),  # int16[16 * tile_size], the centre of sixteen whole tiles, or 0
        ("ring_codes", np.intp),  # uint8[ow, t * B], of pad pixels; 0 where there are none
        ("ring_norms", np.intp),  # uint8[ow, t * repeat]
        ("ring_sums", np.intp),  # int32[ow + 15]
        ("scratch", np.intp),  # uint8[slots, WINDOWS * scratch_step or more]
        ("lengths", np.intp),  # int32[slots, run * t or more], scratch
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
        ("tile_size", np.intp),
        ("tiles", np.intp),
        ("fours", np.intp),  # of features in a tile, rounded up
        ("last_fours", np.intp),  # of the last tile
        ("sixteens", np.intp),  # of features in a tile, rounded up
        ("last_sixteens", np.intp),  # of the last tile
        ("lanes", np.intp),  # k, rounded up to a multiple of the block
        ("code", np.intp),  # B
        ("pieces", np.intp),  # pieces of ``repeat`` bytes in which codes lie apart, see ``Interleaved``; else 1
        ("repeat", np.intp),  # bytes of a norm
        ("scratch_row", np.intp),  # bytes of one slot
        ("scratch_step", np.intp),  # bytes from a gathered window to the next, ``SLACK`` more than it has features
        ("lengths_row", np.intp),  # numbers of one slot
        ("norm_scale", np.float64),
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


def block_of(hash_length: int) -> int:
    """Bits that are computed at once: 64, 32 or 16, of which the sums of four windows fit into registers."""
    widest = 64 if target_has("avx512f") else 32 if target_has("avx2") else 16
    return next(block for block in (64, 32, 16) if block <= widest and -(-hash_length // 16) * 16 % block == 0)


def lsh_encode_integer(block: int, fours: int) -> int:
    """Address of the kernel.

    Args:
        block: bits that are computed at once, see ``block_of``.
        fours: of features in a tile; where they are few, their projection stays in registers.
    """
    kept = fours in _KEPT and fours * block <= 16 * _IN_REGISTERS
    return _kernel(block // 16, fours if kept else 0)


@cache
def _kernel(registers: int, fours: int) -> int:
    block, static = (0,) * registers, (0,) * fours

    @native
    def lsh_encode_integer_kernel(arguments: int, begin: int, end: int, slot: int) -> None:
        _encode(_arguments_at(arguments), begin, end, slot, block, static)

    return lsh_encode_integer_kernel()


@inlined
def _encode(p: Any, begin: int, end: int, slot: int, block: Any, fours: Any) -> None:
    """Hashes the positions begin..end of the flattened [n, oh, ow]."""
    h, w, c, oh, ow, sy, sx, top, left = p.h, p.w, p.c, p.oh, p.ow, p.sy, p.sx, p.top, p.left
    longest = WINDOWS if _gathers(p) else LONGEST_RUN
    # Columns whose window is a pixel; all of them where windows have several taps.
    inner, outer = 0, ow
    if p.ring_codes:
        inner, outer = (left + sx - 1) // sx, min(ow, (w - 1 + left) // sx + 1)
    image, rest = divmod(begin, oh * ow)
    oy, ox = divmod(rest, ow)
    position, row = begin, begin - ox
    done = begin  # positions before it are written
    while position < end:
        first = max(position, row + inner)
        last = min(end, row + outer)
        if p.ring_codes and not 0 <= oy * sy - top < h:
            last = first
        while first < last:
            _copy_ring(p, done, first)
            done = min(last, first + longest)
            column = first - row
            pixel = (image * h + oy * sy - top) * w + column * sx - left
            source, step = p.x + pixel * c, sx * c
            if _gathers(p):  # asked anew, so that LLVM does not make two loops
                _gather(p, image, oy, column, done - first, slot)
                source, step = p.scratch + slot * p.scratch_row, p.scratch_step
            _hash(p, source, step, first, done, slot, block, fours)
            first = done
        row += ow
        position = row
        oy += 1
        if oy == oh:
            oy = 0
            image += 1
    _copy_ring(p, done, end)


@inlined
def _gathers(p: Any) -> bool:
    """Whether windows are copied before they are hashed, as they are no run of memory."""
    return p.runs != 0


@helper
def _copy_ring(p: Any, begin: int, end: int) -> None:
    """Writes what a pad pixel has to the positions begin..end."""
    codes, norms, sums = bytes_at(p.codes), bytes_at(p.norms), int32_at(p.sums)
    ring_codes, ring_norms, ring_sums = bytes_at(p.ring_codes), bytes_at(p.ring_norms), int32_at(p.ring_sums)
    code, norm = p.tiles * p.code, p.tiles * p.repeat
    while begin < end:
        count = min(end - begin, p.ow)
        copy_bytes(ring_codes, 0, codes, begin * code, count * code)
        copy_bytes(ring_norms, 0, norms, begin * norm, count * norm)
        for i in range(0, count, 16):
            store_first(sums, begin + i, load16(ring_sums, i), min(16, count - i))
        begin += count


@helper
def _gather(p: Any, image: int, oy: int, ox: int, count: int, slot: int) -> None:
    """Copies windows of one row to the scratch, one after the other."""
    x, zeros, scratch = bytes_at(p.x), bytes_at(p.zeros), bytes_at(p.scratch + slot * p.scratch_row)
    gather_byte_runs(x, zeros, intp_at(p.runs), p.run_count, p, image, oy, ox, count, scratch, p.scratch_step)


@inlined
def _hash(p: Any, source: int, step: int, first: int, last: int, slot: int, block: Any, fours: Any) -> None:
    """Hashes the positions first..last, whose windows begin at ``source`` and every ``step`` bytes after it."""
    windows = bytes_at(source)
    write_norms(p, windows, step, first, last, slot, fours)
    row = 0
    width = 16 * len(block)
    together = 4 // p.repeat if p.pieces > 1 else 1
    for tile in range(p.tiles):
        unit = (first * p.tiles + tile // together * together) * p.code + tile % together * p.repeat
        for bit in range(0, p.lanes, width):
            to = unit + (bit // 8 if p.pieces == 1 else bit // 8 // p.repeat * 4)
            size = min(width // 8, p.code - bit // 8)
            at = tile * p.tile_size
            start = tile * p.lanes + bit
            if len(fours):
                _project_kept(p, windows, at, step, last - first, row, start, to, size, block, len(fours))
                row += len(fours) * width
            else:
                count = p.fours if tile < p.tiles - 1 else p.last_fours
                _project(p, windows, at, step, last - first, count, row, start, to, size, block)
                row += p.fours * width


@inlined
def _project_kept(
    p: Any, windows: Any, at: int, step: int, count: int, row: int, start: int, to: int, size: int, block: Any,
    fours: int,
) -> None:  # fmt: skip
    """Writes ``size`` bytes of the codes of one tile of windows, one after the other.

    The number of loads of the projection is known when compiling, so LLVM keeps them in registers.
    """
    projection, starts, codes = int32_at(p.projection), int32_at(p.start), bytes_at(p.codes)
    width, stride = 16 * len(block), p.tiles * p.code
    for _ in range(count):
        a = load_constant(starts, start, block)
        for j in range(fours):
            weights = load_constant(projection, row + j * width, block)
            a = dot_bytes(a, broadcast(windows, at + 4 * j, block), weights)
        _store_code(codes, to, negative_bits(a), size, 2 * len(block), p)
        at += step
        to += stride


@inlined
def _project(
    p: Any, windows: Any, at: int, step: int, count: int, fours: int, row: int, start: int, to: int, size: int,
    block: Any,
) -> None:  # fmt: skip
    """Writes ``size`` bytes of the codes of one tile of windows, four at a time."""
    projection, starts, codes = int32_at(p.projection), int32_at(p.start), bytes_at(p.codes)
    width, stride = 16 * len(block), p.tiles * p.code
    whole = 2 * len(block)
    for i in range(0, count, 4):
        # Beyond the end, the last window is projected again: the same bits to the same place.
        i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        w0, w1, w2, w3 = at + i * step, at + i1 * step, at + i2 * step, at + i3 * step
        a0 = load_constant(starts, start, block)
        a1, a2, a3 = a0, a0, a0
        for j in range(fours):
            weights = load_constant(projection, row + j * width, block)
            a0 = dot_bytes(a0, broadcast(windows, w0 + 4 * j, block), weights)
            a1 = dot_bytes(a1, broadcast(windows, w1 + 4 * j, block), weights)
            a2 = dot_bytes(a2, broadcast(windows, w2 + 4 * j, block), weights)
            a3 = dot_bytes(a3, broadcast(windows, w3 + 4 * j, block), weights)
        _store_code(codes, to + i * stride, negative_bits(a0), size, whole, p)
        _store_code(codes, to + i1 * stride, negative_bits(a1), size, whole, p)
        _store_code(codes, to + i2 * stride, negative_bits(a2), size, whole, p)
        _store_code(codes, to + i3 * stride, negative_bits(a3), size, whole, p)


@inlined
def _store_code(codes: Any, to: int, bits: Any, size: int, whole: int, p: Any) -> None:
    """Writes the ``size`` bytes of a code that exist, of ``whole`` ones; in pieces, see ``Interleaved``."""
    if p.pieces == 1 and size == whole:
        store_bits(codes, to, bits)
    elif p.pieces == 1:
        store_bytes_apart(codes, to, 1, bits, size)
    elif p.repeat == 2:
        store_shorts_apart(codes, to, 4, bits, size // 2)
    else:
        store_bytes_apart(codes, to, 4, bits, size)
