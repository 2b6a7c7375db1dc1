"""What follows the sums of an integer layer: scale, bias, residual, clip, quantise, store.

    y = fl(fl(fl((acc - half) * -2 scale) + bias) + residual)

for ``half = k / 2`` times the sum of norms, so that ``-2 (acc - half)`` is the sum of norms times
``k - 2 d``. Halves, doubles and whole numbers below 2^24 are exact in float32, so each ``fl`` is the one
rounding that the operator asks for. A multiply and an add never become one instruction.

Where only the quantised image is written, its power of two is in scale and bias already.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.integers import (
    quarter0,
    quarter1,
    quarter2,
    quarter3,
    round_words,
    saturate_bytes,
    to_float32,
)
from runtime.kernels.memory import bytes_at, float32_at
from runtime.kernels.vectors import (
    add,
    add_words,
    load16,
    load16_first,
    maximum,
    minimum,
    mul,
    splat16,
    store,
    store_first,
    sub,
)

# The last fields of a kernel's record.
EPILOGUE: tuple[tuple[str, type], ...] = (
    ("doubled", np.intp),  # whether ``scale`` is only negated, as twice a value of it is infinite
    ("clips", np.intp),  # whether the clip changes what is written
    ("scales", np.intp),  # whether ``factor`` is still to be multiplied
    ("clamps", np.intp),  # whether a quantised value may leave the range in which rounding is right
    ("low", np.float32),  # clip_min
    ("high", np.float32),  # clip_max
    ("factor", np.float32),  # power of two that quantises
    ("least", np.float32),  # quantised range
    ("most", np.float32),
    ("zero", np.int32),  # the byte of a quantised 0
)


@inlined
def finish(
    p: Any, a0: Any, a1: Any, a2: Any, a3: Any, h0: float, h1: float, h2: float, h3: float, first: int,
    to0: int, to1: int, to2: int, to3: int,
) -> None:  # fmt: skip
    """Writes sixteen outputs of four positions.

    Args:
        p: record that ends with ``EPILOGUE``.
        a0, a1, a2, a3: sixteen int32 lanes, sums of norms times distances.
        h0, h1, h2, h3: k / 2 times each position's sum of norms.
        first: output of lane 0.
        to0, to1, to2, to3: element of lane 0 in what is written, for each position.
    """
    count = min(16, p.outputs - first)
    y0, y1 = sub(to_float32(a0), splat16(h0)), sub(to_float32(a1), splat16(h1))
    y2, y3 = sub(to_float32(a2), splat16(h2)), sub(to_float32(a3), splat16(h3))
    if p.doubled:
        y0, y1, y2, y3 = add(y0, y0), add(y1, y1), add(y2, y2), add(y3, y3)
    scale, bias = load16(float32_at(p.scale), first), load16(float32_at(p.bias), first)
    y0, y1, y2, y3 = mul(y0, scale), mul(y1, scale), mul(y2, scale), mul(y3, scale)
    y0, y1, y2, y3 = add(y0, bias), add(y1, bias), add(y2, bias), add(y3, bias)
    if p.residual:
        residual = float32_at(p.residual)
        if count == 16:
            y0, y1 = add(y0, load16(residual, to0)), add(y1, load16(residual, to1))
            y2, y3 = add(y2, load16(residual, to2)), add(y3, load16(residual, to3))
        else:
            y0, y1 = add(y0, load16_first(residual, to0, count)), add(y1, load16_first(residual, to1, count))
            y2, y3 = add(y2, load16_first(residual, to2, count)), add(y3, load16_first(residual, to3, count))
    if p.clips:
        y0, y1, y2, y3 = _clamp(y0, y1, y2, y3, p.low, p.high)
    if p.out:
        _store(float32_at(p.out), to0, to1, to2, to3, y0, y1, y2, y3, count)
    if p.quantised:
        whole = _quantise(p, y0, y1, y2, y3)
        if p.outputs == 16 and to3 - to0 == 48:
            store(bytes_at(p.quantised), to0, whole)
        else:
            q0, q1, q2, q3 = quarter0(whole), quarter1(whole), quarter2(whole), quarter3(whole)
            _store(bytes_at(p.quantised), to0, to1, to2, to3, q0, q1, q2, q3, count)


@inlined
def _clamp(y0: Any, y1: Any, y2: Any, y3: Any, low: float, high: float) -> tuple[Any, Any, Any, Any]:
    least, most = splat16(low), splat16(high)
    y0, y1, y2, y3 = maximum(y0, least), maximum(y1, least), maximum(y2, least), maximum(y3, least)
    return minimum(y0, most), minimum(y1, most), minimum(y2, most), minimum(y3, most)


@inlined
def _quantise(p: Any, y0: Any, y1: Any, y2: Any, y3: Any) -> Any:
    """The bytes of four times sixteen quantised values."""
    if p.scales:
        factor = splat16(p.factor)
        y0, y1, y2, y3 = mul(y0, factor), mul(y1, factor), mul(y2, factor), mul(y3, factor)
    if p.clamps:
        y0, y1, y2, y3 = _clamp(y0, y1, y2, y3, p.least, p.most)
    q0, q1, q2, q3 = round_words(y0), round_words(y1), round_words(y2), round_words(y3)
    if p.zero:
        zero = splat16(p.zero)
        q0, q1, q2, q3 = add_words(q0, zero), add_words(q1, zero), add_words(q2, zero), add_words(q3, zero)
    return saturate_bytes(q0, q1, q2, q3)


@inlined
def _store(out: Any, to0: int, to1: int, to2: int, to3: int, v0: Any, v1: Any, v2: Any, v3: Any, count: int) -> None:
    if count == 16:
        store(out, to0, v0)
        store(out, to1, v1)
        store(out, to2, v2)
        store(out, to3, v3)
    else:
        store_first(out, to0, v0, count)
        store_first(out, to1, v1, count)
        store_first(out, to2, v2, count)
        store_first(out, to3, v3, count)
