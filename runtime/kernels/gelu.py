"""The exact ``Gelu``, for which NumPy has no error function."""

from __future__ import annotations

import math
from typing import Any

from runtime.kernels.compiling import compiled


@compiled
def gelu(x: Any, out: Any, begin: int, end: int) -> None:
    """Computes ``y = x (1 + erf(x / sqrt 2)) / 2`` for the elements begin..end.

    Args:
        x: float32[n].
        out: float32[n], written.
        begin: first element.
        end: element after the last.
    """
    for i in range(begin, end):
        value = float(x[i])
        # erfc, and float64: 1 + erf would cancel for a large negative x
        out[i] = 0.5 * value * math.erfc(-value * 0.7071067811865476)
