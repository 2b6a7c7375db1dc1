"""What follows every sum over sixteen outputs: scale, add the residual, clip, round, store."""

from __future__ import annotations

from typing import Any

from numba import njit

from runtime.kernels.integers import float_bits, low_bytes, to_float32
from runtime.kernels.memory import bytes_at, float32_at
from runtime.kernels.vectors import (
    add,
    fma,
    load16,
    load16_first,
    maximum,
    minimum,
    mul,
    narrow,
    splat16,
    store_first,
    sub,
    widen,
)


@njit(inline="always")
def finish16(acc: Any, residual: Any, index: int, count: int, low: float, high: float, out: Any) -> None:
    """``out[index + i] = min(max(acc[i] + residual[index + i], low), high)`` for i below ``count``.

    Args:
        acc: sixteen float32 lanes.
        residual: float32 of the same size as ``out``, or empty.
        index: element of lane 0.
        count: lanes to store, 1 to 16.
        low: least value, float32.
        high: greatest value, float32.
        out: float32, written.
    """
    if residual.size:
        acc = add(acc, load16_first(residual, index, count))
    store_first(out, index, minimum(maximum(acc, splat16(low)), splat16(high)), count)


@njit(inline="always")
def finish_exact16(
    acc: Any,
    scale: Any,
    bias: Any,
    first: int,
    residual: Any,
    index: int,
    count: int,
    low: float,
    high: float,
    out: Any,
) -> None:
    """``out[index + i] = clip(scale acc[i] + bias + residual[index + i])``, in float64 until it is stored.

    Args:
        acc: sixteen float64 lanes.
        scale: float64, one for each output.
        bias: float64, one for each output.
        first: output of lane 0.
        residual: float32 of the same size as ``out``, or empty.
        index: element of lane 0.
        count: lanes to store, 1 to 16.
        low: least value, float64.
        high: greatest value, float64.
        out: float32, written.
    """
    acc = fma(load16(scale, first), acc, load16(bias, first))
    if residual.size:
        acc = add(acc, widen(load16_first(residual, index, count)))
    store_first(out, index, narrow(minimum(maximum(acc, splat16(low)), splat16(high))), count)


@njit(inline="always")
def finish_integer16(acc: Any, half: float, first: int, index: int, p: Any) -> None:
    """Sixteen outputs of an integer layer from their sums of norms times distances.

    ``y = fl(fl(fl(acc * scale) + bias) + residual)``, clipped, each ``fl`` a rounding to float32.
    Halves, doubles and whole numbers below 2^24 are exact.

    Args:
        acc: sixteen int32 lanes.
        half: k / 2 times the position's sum of norms.
        first: output of lane 0.
        index: element of lane 0 in what is written.
        p: record of ``runtime.kernels.lsh_conv_integer``.
    """
    count = min(16, p.outputs - first)
    # scale holds -2 scale: -2 (acc - half) is the sum of norms times (k - 2 d).
    y = sub(to_float32(acc), splat16(half))
    if p.doubled:
        y = add(y, y)
    y = add(mul(y, load16(float32_at(p.scale), first)), load16(float32_at(p.bias), first))
    if p.residual:
        y = add(y, load16_first(float32_at(p.residual), index, count))
    y = minimum(maximum(y, splat16(p.low)), splat16(p.high))
    if p.out:
        store_first(float32_at(p.out), index, y, count)
    if p.quantised:
        z = minimum(maximum(mul(y, splat16(p.factor)), splat16(p.least)), splat16(p.most))
        whole = low_bytes(float_bits(add(z, splat16(p.rounding))))
        store_first(bytes_at(p.quantised), index, whole, count)
