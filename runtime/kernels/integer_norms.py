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
    square_root,
    subtract_words,
    to_float64,
    truncate,
    widen_bytes,
)
from runtime.kernels.memory import bytes_at, int16_at, int32_at
from runtime.kernels.squares import neighbour_sums, squares_of_sixteen, sum_of_squares, sums_of_eight
from runtime.kernels.vectors import add, add_words, load16, minimum, mul, splat16, store, store_first


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
    lengths = int32_at(p.lengths + 4 * slot * p.lengths_row)
    tiles, repeat, size, pattern = p.tiles, p.repeat, p.tile_size, int16_at(p.pattern)
    units, unit = (last - first) * tiles, first * tiles
    norms, shorts, words, sums = bytes_at(p.norms), int16_at(p.norms), int32_at(p.norms), int32_at(p.sums)
    scale, half, most = splat16(p.norm_scale), splat16(0.5), splat16(255.0)
    side_by_side = len(fours) > 0 and p.pattern != 0 and step == tiles * size
    kept = tiles not in (1, 2, 4) or repeat not in (1, 2, 4)
    if not side_by_side and p.tiles == 1:
        _measure(p, windows, step, units, lengths)
    elif not side_by_side:
        _measure_tiles(p, windows, step, last - first, lengths)
    # Fields are read anew, so that LLVM does not make a loop for each of their values.
    for i in range(0, units, 16):
        count = min(16, units - i)
        squares = squares_of_sixteen(windows, i * size, pattern, fours) if side_by_side else load16(lengths, i)
        root = square_root(to_float64(squares))
        norm = truncate(minimum(add(mul(root, scale), half), most))
        if p.repeat == 4:
            _store(words, unit + i, multiply_words(norm, splat16(np.int32(0x01010101))), count, 16)
        elif p.repeat == 2:
            _store(shorts, unit + i, low_shorts(multiply_words(norm, splat16(np.int32(0x0101)))), count, 16)
        elif p.repeat == 1:
            _store(norms, unit + i, low_bytes(norm), count, 16)
        if p.tiles == 1:
            _store(sums, first + i, norm, count, 16)
        elif p.tiles == 2:
            _store(sums, first + i // 2, neighbour_sums(norm), count // 2, 8)
        elif p.tiles == 4:
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


@inlined
def _measure(p: Any, windows: Any, step: int, count: int, lengths: Any) -> None:
    """Squared norms of windows that are one tile each, four at a time."""
    chunk = p.sixteens * 16
    for i in range(0, count, 4):
        # Beyond the end, the last window is measured again.
        i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        store(lengths, i, _measure_four(p, windows, i * step, i1 * step, i2 * step, i3 * step, 0, chunk))


@inlined
def _measure_tiles(p: Any, windows: Any, step: int, count: int, lengths: Any) -> None:
    """Squared norms of several tiles of windows; the last tile may be short."""
    tiles, row = p.tiles, p.sixteens * 16
    spare = count * tiles  # four places after the last
    for tile in range(tiles):
        at = tile * p.tile_size
        chunk = row if tile < tiles - 1 else p.last_sixteens * 16
        for i in range(0, count, 4):
            i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
            w0, w1, w2, w3 = at + i * step, at + i1 * step, at + i2 * step, at + i3 * step
            store(lengths, spare, _measure_four(p, windows, w0, w1, w2, w3, tile * row, chunk))
            lengths[i * tiles + tile] = lengths[spare]
            lengths[i1 * tiles + tile] = lengths[spare + (i1 - i)]
            lengths[i2 * tiles + tile] = lengths[spare + (i2 - i)]
            lengths[i3 * tiles + tile] = lengths[spare + (i3 - i)]


@inlined
def _measure_four(p: Any, windows: Any, w0: int, w1: int, w2: int, w3: int, row: int, chunk: int) -> Any:
    """Squared norms of four runs of ``chunk`` features, of the tile whose centre begins at ``row``."""
    centre, present = int16_at(p.centre), int16_at(p.present)
    total = _squares(windows, centre, present, w0, w1, w2, w3, row)
    for i in range(16, chunk, 16):
        total = add_words(total, _squares(windows, centre, present, w0 + i, w1 + i, w2 + i, w3 + i, row + i))
    return sums_of_eight(total)


@inlined
def _squares(windows: Any, centre: Any, present: Any, w0: int, w1: int, w2: int, w3: int, row: int) -> Any:
    """Squares of sixteen features of four windows, added in pairs."""
    v = subtract_words(widen_bytes(load_four(windows, w0, w1, w2, w3)), load_four(centre, row, row, row, row))
    return sum_of_squares(and_words(v, load_four(present, row, row, row, row)))


@helper
def _write_apart(p: Any, lengths: Any, first: int, last: int) -> None:
    """Repeats norms and adds them up where no vector fits."""
    norms, sums = bytes_at(p.norms), int32_at(p.sums)
    to = first * p.tiles * p.repeat
    unit = 0
    for position in range(first, last):
        total = np.int32(0)
        for _ in range(p.tiles):
            norm = lengths[unit]
            total += norm
            for j in range(0, p.repeat, 16):
                store_first(norms, to + j, splat16(np.uint8(norm)), min(16, p.repeat - j))
            to += p.repeat
            unit += 1
        sums[position] = total
