"""Norms of integer layers: squares of centred bytes, their roots, scaled and rounded to a byte.

``norm = min(255, floor(sqrt(S) * norm_scale + 0.5))`` in float64, each step rounded once. The least
of the two is taken before the floor, which gives the same, so that the byte never overflows.
Sixteen tiles are measured at a time, whichever windows they belong to; where whole tiles lie side by
side, their bytes are one run of memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import helper, inlined
from runtime.kernels.integers import (
    and_words,
    load_four,
    low_bytes,
    low_shorts,
    multiply_words,
    neighbour_sums,
    square_root,
    squares_of_sixteen,
    subtract_words,
    sum_of_squares,
    sums_of_eight,
    to_float64,
    truncate,
    widen_bytes,
)
from runtime.kernels.memory import bytes_at, int16_at, int32_at
from runtime.kernels.vectors import add, add_words, minimum, mul, splat16, store, store_first


@inlined
def write_norms(p: Any, windows: Any, step: int, first: int, last: int, slot: int, fours: Any) -> None:
    """Writes the norms of the positions first..last and the sums over their tiles.

    Args:
        p: record of ``runtime.kernels.lsh_encode_integer``.
        windows: uint8, the first window and every ``step`` bytes another.
        step: bytes from a window to the next.
        first: first position.
        last: position after the last.
        slot: row of the scratch to use.
        fours: see ``squares_of_sixteen``.
    """
    centre, present, pattern = int16_at(p.centre), int16_at(p.present), int16_at(p.pattern)
    lengths = int32_at(p.lengths + 4 * slot * p.lengths_row)
    tiles, repeat, size, chunk = p.tiles, p.repeat, p.tile_size, p.sixteens * 16
    units, unit = (last - first) * tiles, first * tiles
    norms, shorts, words, sums = bytes_at(p.norms), int16_at(p.norms), int32_at(p.norms), int32_at(p.sums)
    scale, half, most = splat16(p.norm_scale), splat16(0.5), splat16(255.0)
    kept = tiles not in (1, 2, 4) or repeat not in (1, 2, 4)
    back = step - tiles * size
    tile, at = 0, 0
    for i in range(0, units, 16):
        count = min(16, units - i)
        if len(fours) and p.pattern and back == 0:
            squares = squares_of_sixteen(windows, i * size, pattern, fours)
        else:
            s0, tile, at = _measure(windows, centre, present, tile, at, tiles, size, chunk, back, units - i)
            s1, tile, at = _measure(windows, centre, present, tile, at, tiles, size, chunk, back, units - i - 4)
            s2, tile, at = _measure(windows, centre, present, tile, at, tiles, size, chunk, back, units - i - 8)
            s3, tile, at = _measure(windows, centre, present, tile, at, tiles, size, chunk, back, units - i - 12)
            squares = sums_of_eight(s0, s1, s2, s3)
        root = square_root(to_float64(squares))
        norm = truncate(minimum(add(mul(root, scale), half), most))
        if repeat == 4:
            _store(words, unit + i, multiply_words(norm, splat16(np.int32(0x01010101))), count, 16)
        elif repeat == 2:
            _store(shorts, unit + i, low_shorts(multiply_words(norm, splat16(np.int32(0x0101)))), count, 16)
        elif repeat == 1:
            _store(norms, unit + i, low_bytes(norm), count, 16)
        if tiles == 1:
            _store(sums, first + i, norm, count, 16)
        elif tiles == 2:
            _store(sums, first + i // 2, neighbour_sums(norm), count // 2, 8)
        elif tiles == 4:
            _store(sums, first + i // 4, neighbour_sums(neighbour_sums(norm)), count // 4, 4)
        if kept:
            store(lengths, i, norm)
    if kept:
        _write_apart(p, lengths, first, last)


@inlined
def _store(array: Any, index: int, vector: Any, count: int, lanes: int) -> None:
    if count == lanes:
        store(array, index, vector)
    else:
        store_first(array, index, vector, count)


@helper
def _measure(
    windows: Any, centre: Any, present: Any, tile: int, at: int, tiles: int, size: int, chunk: int, back: int, left: int
) -> tuple[Any, int, int]:
    """Squares of four tiles, added up to eight sums a tile; and the tile that comes next, and its place.

    Of the ``left`` tiles that there are, the last is measured instead of those beyond it.
    """
    tile0, at0 = tile, at
    tile1, at1 = _next_tile(tile0, at0, tiles, size, back, left > 1)
    tile2, at2 = _next_tile(tile1, at1, tiles, size, back, left > 2)
    tile3, at3 = _next_tile(tile2, at2, tiles, size, back, left > 3)
    tile, at = _next_tile(tile3, at3, tiles, size, back, left > 4)
    r0, r1, r2, r3 = tile0 * chunk, tile1 * chunk, tile2 * chunk, tile3 * chunk
    total = _squares(windows, centre, present, at0, at1, at2, at3, r0, r1, r2, r3)
    for i in range(16, chunk, 16):
        more = _squares(windows, centre, present, at0 + i, at1 + i, at2 + i, at3 + i, r0 + i, r1 + i, r2 + i, r3 + i)
        total = add_words(total, more)
    return total, tile, at


@inlined
def _next_tile(tile: int, at: int, tiles: int, size: int, back: int, more: bool) -> tuple[int, int]:
    if more:
        tile += 1
        at += size
        if tile == tiles:
            tile = 0
            at += back
    return tile, at


@inlined
def _squares(
    windows: Any, centre: Any, present: Any, w0: int, w1: int, w2: int, w3: int, r0: int, r1: int, r2: int, r3: int
) -> Any:
    """Squares of sixteen features of four tiles, added in pairs."""
    v = subtract_words(widen_bytes(load_four(windows, w0, w1, w2, w3)), load_four(centre, r0, r1, r2, r3))
    return sum_of_squares(and_words(v, load_four(present, r0, r1, r2, r3)))


@helper
def _write_apart(p: Any, lengths: Any, first: int, last: int) -> None:
    """Repeats norms and adds them up where no vector fits."""
    norms, sums, tiles, repeat = bytes_at(p.norms), int32_at(p.sums), p.tiles, p.repeat
    for i in range(last - first):
        total = np.int32(0)
        for tile in range(tiles):
            norm = lengths[i * tiles + tile]
            total += norm
            for j in range(repeat):
                norms[((first + i) * tiles + tile) * repeat + j] = np.uint8(norm)
        sums[first + i] = total
