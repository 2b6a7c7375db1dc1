"""What follows the sums of an integer layer: scale, bias, residual, clip, quantise, store.

    y = fl(fl(fl((acc - half) * -2 scale) + bias) + residual)

for ``half = k / 2`` times the sum of norms, so that ``-2 (acc - half)`` is the sum of norms times
``k - 2 d``. Halves, doubles and whole numbers below 2^24 are exact in float32, so each ``fl`` is the one
rounding that the operator asks for. A multiply and an add never become one instruction.

Where only the quantised image is written, its power of two is in scale and bias already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.integers import to_float32
from runtime.kernels.memory import bytes_at, float32_at
from runtime.kernels.narrowing import quarter0, quarter1, quarter2, quarter3, round_words, saturate_bytes
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
    ("scale", np.intp),  # address of float32[blocks * 16], times -2, or times -1 where ``doubled``
    ("bias", np.intp),  # address of float32[blocks * 16]
    ("residual", np.intp),  # address of float32[positions, outputs], or 0
    ("out", np.intp),  # address of float32[positions, outputs], written, or 0
    ("quantised", np.intp),  # address of uint8[positions, outputs], written, or 0
    ("outputs", np.intp),
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


class Epilogue(NamedTuple):
    """``EPILOGUE`` in registers, where stores do not make LLVM read it anew."""

    scale: int
    bias: int
    residual: int
    out: int
    quantised: int
    outputs: int
    doubled: int
    clips: int
    scales: int
    clamps: int
    low: float
    high: float
    factor: float
    least: float
    most: float
    zero: int


@inlined
def load_epilogue(p: Any) -> Epilogue:
    """Reads the fields from a record that ends with them."""
    return Epilogue(
        p.scale, p.bias, p.residual, p.out, p.quantised, p.outputs, p.doubled, p.clips, p.scales, p.clamps,
        p.low, p.high, p.factor, p.least, p.most, p.zero,
    )  # fmt: skip


@inlined
def is_plain(e: Epilogue) -> bool:
    """Whether ``finish_plain`` gives the answer: whole blocks of bytes that saturation alone brings into range."""
    other = e.doubled + e.clips + e.scales + e.clamps + e.zero
    return other == 0 and e.residual == 0 and e.out == 0 and e.outputs % 16 == 0


@inlined
def finish_plain(
    e: Epilogue, halves: Any, a0: Any, a1: Any, a2: Any, a3: Any, position: int, i1: int, i2: int, i3: int, first: int,
) -> None:  # fmt: skip
    """``finish`` without anything that may be left out."""
    scale, bias = load16(float32_at(e.scale), first), load16(float32_at(e.bias), first)
    y0, y1 = sub(to_float32(a0), splat16(halves[position])), sub(to_float32(a1), splat16(halves[position + i1]))
    y2, y3 = sub(to_float32(a2), splat16(halves[position + i2])), sub(to_float32(a3), splat16(halves[position + i3]))
    y0, y1, y2, y3 = mul(y0, scale), mul(y1, scale), mul(y2, scale), mul(y3, scale)
    y0, y1, y2, y3 = add(y0, bias), add(y1, bias), add(y2, bias), add(y3, bias)
    whole = saturate_bytes(round_words(y0), round_words(y1), round_words(y2), round_words(y3))
    to0 = position * e.outputs + first
    if e.outputs == 16 and i3 == 3:
        store(bytes_at(e.quantised), to0, whole)
    else:
        to1, to2 = (position + i1) * e.outputs + first, (position + i2) * e.outputs + first
        store(bytes_at(e.quantised), to0, quarter0(whole))
        store(bytes_at(e.quantised), to1, quarter1(whole))
        store(bytes_at(e.quantised), to2, quarter2(whole))
        store(bytes_at(e.quantised), (position + i3) * e.outputs + first, quarter3(whole))


@inlined
def finish(
    e: Epilogue, halves: Any, a0: Any, a1: Any, a2: Any, a3: Any, position: int, i1: int, i2: int, i3: int, first: int,
) -> None:  # fmt: skip
    """Writes sixteen outputs of four positions.

    Args:
        e: how.
        halves: float32[positions], k / 2 times each position's sum of norms.
        a0, a1, a2, a3: sixteen int32 lanes, sums of norms times distances.
        position: the first of them.
        i1, i2, i3: from it to the others.
        first: output of lane 0.
    """
    outputs = e.outputs
    count = min(16, outputs - first)
    to0, to1 = position * outputs + first, (position + i1) * outputs + first
    to2, to3 = (position + i2) * outputs + first, (position + i3) * outputs + first
    y0, y1 = sub(to_float32(a0), splat16(halves[position])), sub(to_float32(a1), splat16(halves[position + i1]))
    y2, y3 = sub(to_float32(a2), splat16(halves[position + i2])), sub(to_float32(a3), splat16(halves[position + i3]))
    if e.doubled:
        y0, y1, y2, y3 = add(y0, y0), add(y1, y1), add(y2, y2), add(y3, y3)
    scale, bias = load16(float32_at(e.scale), first), load16(float32_at(e.bias), first)
    y0, y1, y2, y3 = mul(y0, scale), mul(y1, scale), mul(y2, scale), mul(y3, scale)
    y0, y1, y2, y3 = add(y0, bias), add(y1, bias), add(y2, bias), add(y3, bias)
    if e.residual:
        residual = float32_at(e.residual)
        if count == 16:
            y0, y1 = add(y0, load16(residual, to0)), add(y1, load16(residual, to1))
            y2, y3 = add(y2, load16(residual, to2)), add(y3, load16(residual, to3))
        else:
            y0, y1 = add(y0, load16_first(residual, to0, count)), add(y1, load16_first(residual, to1, count))
            y2, y3 = add(y2, load16_first(residual, to2, count)), add(y3, load16_first(residual, to3, count))
    if e.clips:
        y0, y1, y2, y3 = _clamp(y0, y1, y2, y3, e.low, e.high)
    if e.out:
        _store(float32_at(e.out), to0, to1, to2, to3, y0, y1, y2, y3, count)
    if e.quantised:
        whole = _quantise(e, y0, y1, y2, y3)
        q0, q1, q2, q3 = quarter0(whole), quarter1(whole), quarter2(whole), quarter3(whole)
        _store(bytes_at(e.quantised), to0, to1, to2, to3, q0, q1, q2, q3, count)


@inlined
def _clamp(y0: Any, y1: Any, y2: Any, y3: Any, low: float, high: float) -> tuple[Any, Any, Any, Any]:
    least, most = splat16(low), splat16(high)
    y0, y1, y2, y3 = maximum(y0, least), maximum(y1, least), maximum(y2, least), maximum(y3, least)
    return minimum(y0, most), minimum(y1, most), minimum(y2, most), minimum(y3, most)


@inlined
def _quantise(e: Epilogue, y0: Any, y1: Any, y2: Any, y3: Any) -> Any:
    """The bytes of four times sixteen quantised values."""
    if e.scales:
        factor = splat16(e.factor)
        y0, y1, y2, y3 = mul(y0, factor), mul(y1, factor), mul(y2, factor), mul(y3, factor)
    if e.clamps:
        y0, y1, y2, y3 = _clamp(y0, y1, y2, y3, e.least, e.most)
    q0, q1, q2, q3 = round_words(y0), round_words(y1), round_words(y2), round_words(y3)
    if e.zero:
        zero = splat16(e.zero)
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
