"""Copies boxes of 32-bit elements between arrays of four axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.kernels.compiling import inlined
from runtime.kernels.memory import int32_at, make_record
from runtime.kernels.native import native
from runtime.kernels.vectors import load16, load16_first, splat16, store, store_first

# Fields of the record; steps are in bytes, elements of the last axis lie side by side.
ARGUMENTS = np.dtype(
    [
        ("source", np.intp),  # address of the box's first element
        ("target", np.intp),  # alike
        ("b", np.intp),  # extents of the axes after the first
        ("c", np.intp),
        ("d", np.intp),
        ("source_a", np.intp),  # steps along the axes but the last
        ("source_b", np.intp),
        ("source_c", np.intp),
        ("target_a", np.intp),
        ("target_b", np.intp),
        ("target_c", np.intp),
        ("filled", np.intp),  # address of elements to fill before anything is copied, or 0
        ("size", np.intp),  # their number for each position of the first axis
        ("fill", np.int32),  # bits of the element that fills
    ],
    align=True,
)
_arguments_at = make_record(ARGUMENTS)


@native
def copy_box(arguments: int, begin: int, end: int, slot: int) -> None:
    """Copies the positions begin..end of the first axis; see ``ARGUMENTS``."""
    p = _arguments_at(arguments)
    if p.filled:
        filled = int32_at(p.filled + 4 * begin * p.size)
        for i in range(0, (end - begin) * p.size, 16):
            store_first(filled, i, splat16(p.fill), min(16, (end - begin) * p.size - i))
    b, c, d = p.b, p.c, p.d
    for i in range(begin, end):
        for j in range(b):
            source = p.source + i * p.source_a + j * p.source_b
            target = p.target + i * p.target_a + j * p.target_b
            for _ in range(c):
                _copy_run(source, target, d)
                source += p.source_c
                target += p.target_c


@inlined
def _copy_run(source: int, target: int, count: int) -> None:
    """Copies ``count`` elements that lie side by side."""
    given, out = int32_at(source), int32_at(target)
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(out, i, load16(given, i))
    if whole < count:
        store_first(out, whole, load16_first(given, whole, count - whole), count - whole)


def box_fields(source: Any, target: Any) -> dict[str, Any] | None:
    """Fields of the record for two views of equal shape, or nothing where the kernel does not copy them.

    Args:
        source: view of an array of 32-bit elements, of one to four axes.
        target: alike.
    """
    elements = source.dtype == target.dtype and source.dtype.itemsize == 4
    if not elements or not 1 <= source.ndim <= 4 or 0 in source.shape:
        return None
    if any(view.shape[-1] > 1 and view.strides[-1] != 4 for view in (source, target)):
        return None
    axes = (1,) * (4 - source.ndim) + source.shape
    steps = [(0,) * (4 - view.ndim) + view.strides for view in (source, target)]
    fields = {"b": axes[1], "c": axes[2], "d": axes[3], "filled": 0, "size": 0, "fill": 0}
    for name, view, step in zip(("source", "target"), (source, target), steps, strict=True):
        fields |= {name: view.__array_interface__["data"][0]}
        fields |= {f"{name}_{axis}": number for axis, number in zip("abc", step, strict=False)}
    return fields
