"""Norms of integer layers: roots of whole numbers, scaled and rounded to a byte.

``norm = min(255, floor(sqrt(S) * norm_scale + 0.5))`` in float64, each step rounded once. The least
of the two is taken before the floor, which gives the same, so that the byte never overflows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import helper
from runtime.kernels.integers import low_bytes, multiply_words, square_root, to_float64, truncate
from runtime.kernels.memory import bytes_at, int32_at
from runtime.kernels.vectors import add, load16, minimum, mul, splat16, store_first


@helper
def write_norms(p: Any, squares: Any, first: int, last: int) -> None:
    """Writes the norms of the positions first..last and the sums over their tiles.

    Args:
        p: record of ``runtime.kernels.lsh_encode_integer``.
        squares: int32[(last - first) * tiles and up to fifteen more], overwritten.
        first: first position.
        last: position after the last.
    """
    norms, sums, tiles, repeat = bytes_at(p.norms), int32_at(p.sums), p.tiles, p.repeat
    count = (last - first) * tiles
    unit = first * tiles
    words = int32_at(p.norms)
    scale, half, most = splat16(p.norm_scale), splat16(0.5), splat16(255.0)
    for i in range(0, count, 16):
        root = square_root(to_float64(load16(squares, i)))
        norm = truncate(minimum(add(mul(root, scale), half), most))
        lanes = min(16, count - i)
        if repeat == 4:
            store_first(words, unit + i, multiply_words(norm, splat16(np.int32(0x01010101))), lanes)
        elif repeat == 1:
            store_first(norms, unit + i, low_bytes(norm), lanes)
        if tiles == 1:
            store_first(sums, first + i, norm, lanes)
        store_first(squares, i, norm, lanes)
    if repeat != 4 and repeat != 1:
        for i in range(count):
            for j in range(repeat):
                norms[(unit + i) * repeat + j] = np.uint8(squares[i])
    if tiles != 1:
        for i in range(last - first):
            total = np.int32(0)
            for tile in range(tiles):
                total += squares[i * tiles + tile]
            sums[first + i] = total
