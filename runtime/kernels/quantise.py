"""Quantises activations: ``clamp(round_half_to_even(x * 2^exponent), low, high) - low`` as bytes.

The bytes lie channels-last, as the encoder reads them, whatever the order of ``x``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.integers import low_bytes, store_apart
from runtime.kernels.memory import bytes_at, float32_at, make_record
from runtime.kernels.narrowing import round_words
from runtime.kernels.native import native
from runtime.kernels.vectors import add_words, load16_first, maximum, minimum, mul, splat16, store_first

# Fields of the record; the first ones are addresses.
ARGUMENTS = np.dtype(
    [
        ("x", np.intp),  # float32[n, area, c], or [n, c, area]
        ("out", np.intp),  # uint8[n, area, c], written
        ("planes", np.intp),  # whether x is [n, c, area]
        ("area", np.intp),
        ("channels", np.intp),
        ("factor", np.float32),  # 2 ** exponent
        ("least", np.float32),  # low
        ("most", np.float32),  # high
        ("zero", np.int32),  # -low
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


@native
def quantise(arguments: int, begin: int, end: int, slot: int) -> None:
    """Quantises the images begin..end; see ``ARGUMENTS``."""
    p = _arguments_at(arguments)
    size = p.area * p.channels
    if not p.planes:
        x, out = float32_at(p.x), bytes_at(p.out)
        for i in range(begin * size, end * size, 16):
            count = min(16, end * size - i)
            store_first(out, i, _quantise16(p, x, i, count), count)
        return
    for image in range(begin, end):
        out, x = bytes_at(p.out + image * size), float32_at(p.x + 4 * image * size)
        for first in range(0, p.area, 16):
            count = min(16, p.area - first)
            for channel in range(p.channels):
                pixels = _quantise16(p, x, channel * p.area + first, count)
                store_apart(out, first * p.channels + channel, p.channels, pixels, count)


@inlined
def _quantise16(p: Any, x: Any, at: int, count: int) -> Any:
    z = mul(load16_first(x, at, count), splat16(p.factor))
    z = minimum(maximum(z, splat16(p.least)), splat16(p.most))
    return low_bytes(add_words(round_words(z), splat16(p.zero)))
