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
def _copy_freely(source: Any, at: int, out: Any, to: int, count: int) -> None:
    """As ``copy_bytes``, but reads and writes up to fifteen bytes after the last."""
    for i in range(0, count, 16):
        store(out, to + i, load16(source, at + i))


@inlined
def gather_bytes(x: Any, zeros: Any, window: Any, image: int, oy: int, ox: int, out: Any, to: int) -> None:
    """Copies a window in the order (ky, kx, channel).

    Up to fifteen bytes after an image are read, and as many after the window overwritten, so windows
    are gathered in the order in which they lie in ``out``.

    Args:
        x: uint8 image batch [n, h, w, c], flat.
        zeros: uint8, at least ``c`` bytes of a pad.
        window: has the fields of ``Window``.
        image: number of the image.
        oy: row of the position.
        ox: column of the position.
        out: uint8 scratch, written.
        to: element of ``out`` that takes the first feature.
    """
    left = ox * window.sx - window.left
    count = window.c
    # Taps side by side are one run of memory.
    run = window.dx == 1 and left >= 0 and left + window.kw <= window.w
    for ky in range(window.kh):
        y = oy * window.sy + ky * window.dy - window.top
        row = (image * window.h + y) * window.w
        if run and 0 <= y < window.h:
            _copy_freely(x, (row + left) * count, out, to, window.kw * count)
            to += window.kw * count
            continue
        for kx in range(window.kw):
            column = left + kx * window.dx
            if 0 <= y < window.h and 0 <= column < window.w:
                _copy_freely(x, (row + column) * count, out, to, count)
            else:
                _copy_freely(zeros, 0, out, to, count)
            to += count


@inlined
def gather_byte_runs(
    x: Any, zeros: Any, runs: Any, count: int, window: Any, image: int, oy: int, ox: int, out: Any, to: int
) -> None:
    """Copies a window run by run, in an order that is not that of memory.

    Up to fifteen bytes after an image are read, and as many after a run overwritten, so runs and windows
    are gathered in the order in which they lie in ``out``.

    Args:
        x: uint8 image batch [n, h, w, c], flat.
        zeros: uint8, at least ``c`` bytes of a pad.
        runs: intp[count, 4]: ky, kx, first channel, channels.
        count: runs of a window.
        window: has the fields of ``Window``.
        image: number of the image.
        oy: row of the position.
        ox: column of the position.
        out: uint8 scratch, written.
        to: element of ``out`` where the window begins.
    """
    top, left = oy * window.sy - window.top, ox * window.sx - window.left
    for i in range(0, 4 * count, 4):
        y, column = top + runs[i] * window.dy, left + runs[i + 1] * window.dx
        if 0 <= y < window.h and 0 <= column < window.w:
            at = ((image * window.h + y) * window.w + column) * window.c + runs[i + 2]
            _copy_freely(x, at, out, to, runs[i + 3])
        else:
            _copy_freely(zeros, 0, out, to, runs[i + 3])
        to += runs[i + 3]
