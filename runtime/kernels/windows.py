"""Gathers one window of a channels-last image, minus the centre, into contiguous scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from runtime.kernels.compiling import inlined
from runtime.kernels.vectors import load16, load16_first, store, store_first, sub

SLACK = 16  # elements of scratch after the last window, see ``copy_minus``


class Window(NamedTuple):
    """Extents of an image and of the windows that slide over it.

    Attributes:
        h, w, c: rows, columns and channels of the image.
        oh, ow: positions of the window.
        kh, kw: taps.
        sy, sx: strides, in pixels.
        dy, dx: dilations, in pixels.
        top, left: pads, in pixels.
    """

    h: int
    w: int
    c: int
    oh: int
    ow: int
    kh: int
    kw: int
    sy: int
    sx: int
    dy: int
    dx: int
    top: int
    left: int


@njit(inline="always")
def copy_minus(source: Any, at: int, centre: Any, count: int, out: Any, to: int) -> None:
    """``out[to + i] = source[at + i] - centre[i]`` for i below ``count``.

    Writes whole registers: up to fifteen zeros follow the last element. A masked store would not, but
    the processor cannot forward one to the loads that come next.
    """
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, sub(load16(source, at + i), load16(centre, i)))
    if whole < count:
        pixel = load16_first(source, at + whole, count - whole)
        store(out, to + whole, sub(pixel, load16_first(centre, whole, count - whole)))


@njit(inline="always")
def gather(
    x: Any,
    zeros: Any,
    centre: Any,
    window: Any,
    image: int,
    oy: int,
    ox: int,
    first: int,
    count: int,
    out: Any,
    to: int,
) -> None:
    """Copies a window in the order (ky, kx, channel); a pad pixel is ``0 - centre``.

    Up to fifteen elements after the window are overwritten, so windows are gathered in the order in
    which they lie in ``out``.

    Args:
        x: float32 image batch [n, h, w, c], flat.
        zeros: float32, at least ``count`` zeros.
        centre: float32[kw * count], the channels' centre repeated for each column.
        window: ``Window``.
        image: number of the image.
        oy: row of the position.
        ox: column of the position.
        first: first channel.
        count: channels.
        out: float32 scratch, written; fifteen elements longer than its windows.
        to: element of ``out`` that takes the first feature.
    """
    left = ox * window.sx - window.left
    # Taps side by side with all their channels are one run of memory.
    run = window.dx == 1 and count == window.c and left >= 0 and left + window.kw <= window.w
    for ky in range(window.kh):
        y = oy * window.sy + ky * window.dy - window.top
        row = (image * window.h + y) * window.w
        if run and 0 <= y < window.h:
            copy_minus(x, (row + left) * window.c, centre, window.kw * count, out, to)
            to += window.kw * count
            continue
        for kx in range(window.kw):
            column = left + kx * window.dx
            if 0 <= y < window.h and 0 <= column < window.w:
                copy_minus(x, (row + column) * window.c + first, centre, count, out, to)
            else:
                copy_minus(zeros, 0, centre, count, out, to)
            to += count


@njit(inline="always")
def gather_to_slots(
    x: Any, centre: Any, slots: Any, window: Any, image: int, oy: int, ox: int, out: Any, to: int
) -> None:
    """Copies a window feature by feature; feature (ky, kx, c) goes to ``out[to + slots[ky, kx, c]]``.

    Args:
        x: float32 image batch [n, h, w, c], flat.
        centre: float32[c].
        slots: intp[kh * kw * c].
        window: ``Window``.
        image: number of the image.
        oy: row of the position.
        ox: column of the position.
        out: float32 scratch, written.
        to: element of ``out`` where the window begins.
    """
    feature = 0
    for ky in range(window.kh):
        y = oy * window.sy + ky * window.dy - window.top
        for kx in range(window.kw):
            column = ox * window.sx + kx * window.dx - window.left
            inside = 0 <= y < window.h and 0 <= column < window.w
            at = ((image * window.h + y) * window.w + column) * window.c
            for channel in range(window.c):
                value = x[at + channel] if inside else x.dtype.type(0)
                out[to + slots[feature]] = value - centre[channel]
                feature += 1


@inlined
def copy_bytes(source: Any, at: int, out: Any, to: int, count: int) -> None:
    """``out[to + i] = source[at + i]`` for i below ``count``, which need not be known; nothing else is written."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, load16(source, at + i))
    if whole < count:
        store_first(out, to + whole, load16_first(source, at + whole, count - whole), count - whole)


@inlined
def gather_byte_runs(
    x: Any,
    zeros: Any,
    runs: Any,
    count: int,
    window: Any,
    image: int,
    oy: int,
    ox: int,
    windows: int,
    out: Any,
    stride: int,
) -> None:
    """Copies neighbouring windows of a row, all of them run by run.

    Up to fifteen bytes after an image are read, and as many after a run overwritten: a window's runs are copied in the
    order in which they lie in ``out``.

    Args:
        x: uint8 image batch [n, h, w, c], flat.
        zeros: uint8, the bytes of a pad, fifteen more than the longest run.
        runs: intp[count, 4]: ky, kx, first channel, channels.
        count: runs of a window.
        window: has the fields of ``Window``.
        image: number of the image.
        oy: row of the windows.
        ox: column of the first window.
        windows: their number.
        out: uint8 scratch, written.
        stride: bytes of ``out`` from a window to the next, at least fifteen more than its features.
    """
    top, left = oy * window.sy - window.top, ox * window.sx - window.left
    sx, width = window.sx, window.w
    step = sx * window.c
    to = 0
    for i in range(0, 4 * count, 4):
        y, column, size = top + runs[i] * window.dy, left + runs[i + 1] * window.dx, runs[i + 3]
        # Windows of which this tap lies in the image.
        first, last = 0, windows
        if not 0 <= y < window.h:
            last = 0
        else:
            if column < 0:
                first = min(windows, (sx - 1 - column) // sx)
            if column + (windows - 1) * sx >= width:
                last = max(first, (width - 1 - column) // sx + 1)
        at = ((image * window.h + y) * width + column) * window.c + runs[i + 2]
        _copy_apart(zeros, 0, 0, out, to, stride, first, size)
        _copy_apart(x, at + first * step, step, out, to + first * stride, stride, last - first, size)
        _copy_apart(zeros, 0, 0, out, to + last * stride, stride, windows - last, size)
        to += size


@inlined
def _copy_apart(source: Any, at: int, step: int, out: Any, to: int, stride: int, count: int, size: int) -> None:
    """Copies ``size`` bytes ``count`` times, and up to fifteen more each time."""
    if size <= 16:
        for _ in range(count):
            store(out, to, load16(source, at))
            at += step
            to += stride
    elif size <= 32:
        for _ in range(count):
            low, high = load16(source, at), load16(source, at + 16)
            store(out, to, low)
            store(out, to + 16, high)
            at += step
            to += stride
    else:
        for _ in range(count):
            for j in range(0, size, 16):
                store(out, to + j, load16(source, at + j))
            at += step
            to += stride
