"""Means over the pixels of channels-last images, pixel after pixel in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.memory import float32_at, make_record
from runtime.kernels.native import native
from runtime.kernels.vectors import add, divide, load16, load16_first, splat16, store, store_first

# Fields of the record; the first ones are addresses.
ARGUMENTS = np.dtype(
    [
        ("x", np.intp),  # float32[n, area, c]
        ("out", np.intp),  # float32[n, c], written
        ("area", np.intp),
        ("channels", np.intp),
        ("count", np.float32),  # area
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


@native
def spatial_mean(arguments: int, begin: int, end: int, slot: int) -> None:
    """Averages the images begin..end; see ``ARGUMENTS``."""
    p = _arguments_at(arguments)
    x, out, area, channels = float32_at(p.x), float32_at(p.out), p.area, p.channels
    whole = channels // 16 * 16
    for image in range(begin, end):
        at, to = image * area * channels, image * channels
        for first in range(0, whole, 16):
            total = load16(x, at + first)
            for pixel in range(1, area):
                total = add(total, load16(x, at + first + pixel * channels))
            store(out, to + first, _over(total, p.count))
        rest = channels - whole
        if rest:
            total = load16_first(x, at + whole, rest)
            for pixel in range(1, area):
                total = add(total, load16_first(x, at + whole + pixel * channels, rest))
            store_first(out, to + whole, _over(total, p.count), rest)


@inlined
def _over(total: Any, count: float) -> Any:
    return divide(total, splat16(count))
