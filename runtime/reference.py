"""Ground truth of the custom operators: naive NumPy, as docs/operators.md says it.

Sums run in float64 and are rounded once, as the page demands. Only the packing comes
from elsewhere (``runtime.bitpack``). The operators of version 2 are in ``runtime.reference_integer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bitpack import pack, popcount

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Number = TypeVar("Number", bound=np.number)


def output_extent(extent: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """Positions of a window along one axis, ``floor((extent + padding - reach) / stride) + 1``.

    Args:
        extent: rows or columns of the input.
        kernel: taps along the axis.
        stride: in pixels.
        dilation: in pixels.
        padding: both ends together, in pixels.

    Returns:
        Positions; 0 or less where the window does not fit.
    """
    return (extent + padding - dilation * (kernel - 1) - 1) // stride + 1


def windows(
    image: NDArray[Number], kernel_shape: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> NDArray[Number]:
    """Windows of an image that is already padded.

    Args:
        image: [n, c, h, w] of any dtype.
        kernel_shape: (kh, kw).
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.

    Returns:
        [n, oh, ow, f] of the same dtype, features in the order (c, ky, kx).
    """
    n, c, h, w = image.shape
    (kh, kw), (sy, sx), (dy, dx) = kernel_shape, strides, dilations
    oh, ow = output_extent(h, kh, sy, dy, 0), output_extent(w, kw, sx, dx, 0)
    found = np.empty((n, oh, ow, c, kh, kw), image.dtype)
    for ky in range(kh):
        for kx in range(kw):
            y, x = ky * dy, kx * dx
            tap = image[:, :, y : y + (oh - 1) * sy + 1 : sy, x : x + (ow - 1) * sx + 1 : sx]
            found[..., ky, kx] = tap.transpose(0, 2, 3, 1)
    return found.reshape(n, oh, ow, c * kh * kw)


def lsh_encode(
    x: Floats,
    projection: Floats,
    centre: Floats,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    tile_size: int,
) -> tuple[Codes, Floats]:
    """Hashes the windows of an image: ``codes = pack(P v >= 0)``, ``norms = |v|``.

    Args:
        x: float32[n, c, h, w].
        projection: float32[k, f]; column j belongs to tile ``j // tile_size``.
        centre: float32[c], subtracted after the zero padding.
        kernel_shape: (kh, kw).
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.
        pads: (top, left, bottom, right), in pixels.
        tile_size: features in one tile.

    Returns:
        codes uint8[n, oh, ow, t, ceil(k/8)] and norms float32[n, oh, ow, t].
    """
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    centred = padded - centre[:, None, None]
    features = windows(centred, kernel_shape, strides, dilations).astype(np.float64)
    starts = range(0, features.shape[-1], tile_size)
    codes, norms = [], []
    for start in starts:
        v = features[..., start : start + tile_size]
        p = projection[:, start : start + tile_size].astype(np.float64)
        codes.append(pack(v @ p.T >= 0))
        norms.append(np.sqrt((v * v).sum(-1)))
    return np.stack(codes, axis=3), np.stack(norms, axis=3).astype(np.float32)


def lsh_conv(
    codes: Codes,
    norms: Floats,
    weight_codes: Codes,
    weight_norms: Floats,
    table: Floats,
    scale: NDArray[np.float64],
    bias: NDArray[np.float64],
    residual: Floats | None = None,
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    clip_min: float,
    clip_max: float,
) -> Floats:
    """Estimates a convolution from codes: ``clip(scale sum |x| |W| table[d] + bias + residual)``.

    Args:
        codes: uint8[n, h, w, t, ceil(k/8)].
        norms: float32[n, h, w, t].
        weight_codes: uint8[o, kh, kw, t, ceil(k/8)].
        weight_norms: float32[o, kh, kw, t].
        table: float32[k + 1], estimated cosine at each Hamming distance.
        scale: float64[o].
        bias: float64[o].
        residual: float32[n, o, oh, ow], added before the clip, or nothing.
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.
        clip_min: least value.
        clip_max: greatest value.

    Returns:
        float32[n, o, oh, ow].
    """
    n, h, w = codes.shape[:3]
    o, kh, kw, tiles = weight_norms.shape
    (sy, sx), (dy, dx) = strides, dilations
    oh, ow = output_extent(h, kh, sy, dy, 0), output_extent(w, kw, sx, dx, 0)
    total = np.zeros((n, oh, ow, o), np.float64)
    for ky in range(kh):
        for kx in range(kw):
            rows = slice(ky * dy, ky * dy + (oh - 1) * sy + 1, sy)
            columns = slice(kx * dx, kx * dx + (ow - 1) * sx + 1, sx)
            for i in range(tiles):
                code = codes[:, rows, columns, i, None, :]
                distance = popcount(code ^ weight_codes[:, ky, kx, i])
                norm = norms[:, rows, columns, i, None].astype(np.float64)
                total += norm * weight_norms[:, ky, kx, i] * table[distance].astype(np.float64)
    y = (scale * total + bias).transpose(0, 3, 1, 2)
    if residual is not None:
        y = y + residual
    return np.clip(y, clip_min, clip_max).astype(np.float32)
