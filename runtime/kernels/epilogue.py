"""What follows every sum over sixteen outputs: scale, add the residual, clip, round, store."""

from __future__ import annotations

from typing import Any

from numba import njit

from runtime.kernels.vectors import (
    add,
    fma,
    load16,
    load16_first,
    maximum,
    minimum,
    narrow,
    splat16,
    store_first,
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
