"""Ground truth of the integer operators: naive NumPy, as docs/operators.md says it.

Everything but the norm's square root and the last two lines of a layer is a whole number, so there is
one right answer, bit for bit, and every program gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.bitpack import pack, popcount
from runtime.opset import INTEGER_LEVELS
from runtime.reference import Codes, Floats, output_extent, windows

Whole = NDArray[np.int64]


def quantise(x: Floats, exponent: int, low: int, high: int) -> Whole:
    """Whole numbers of activations: ``clamp(round_half_to_even(x * 2**exponent), low, high)``.

    Args:
        x: float32[...].
        exponent: of the power of two.
        low: least value.
        high: greatest value.

    Returns:
        int64[...].
    """
    with np.errstate(over="ignore"):  # infinity is clamped
        scaled = x * np.float32(2.0**exponent)
    return np.clip(np.rint(scaled), low, high).astype(np.int64)


def quantise_norm(energy: Whole, norm_scale: float) -> Codes:
    """Norms of squared lengths: ``min(255, floor(sqrt(energy) * norm_scale + 0.5))`` in float64.

    Args:
        energy: int64[...], sums of squares.
        norm_scale: a float32 value.

    Returns:
        uint8[...].
    """
    scaled = np.sqrt(energy.astype(np.float64)) * float(np.float32(norm_scale))
    return np.minimum(np.floor(scaled + 0.5), INTEGER_LEVELS).astype(np.uint8)


def lsh_encode_integer(
    x: Floats,
    projection: NDArray[np.int8],
    centre: NDArray[np.int16],
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    tile_size: int,
    exponent: int,
    low: int,
    high: int,
    norm_scale: float,
) -> tuple[Codes, Codes]:
    """Hashes the windows of an image in whole numbers: ``codes = pack(P v >= 0)``, ``norms ~ |v|``.

    Args:
        x: float32[n, c, h, w].
        projection: int8[k, f]; column j belongs to tile ``j // tile_size``.
        centre: int16[c], in quantised units, subtracted after the zero padding.
        kernel_shape: (kh, kw).
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.
        pads: (top, left, bottom, right), in pixels.
        tile_size: features in one tile.
        exponent: activations are multiplied by its power of two before they are rounded.
        low: least quantised activation.
        high: greatest quantised activation.
        norm_scale: levels of a norm for one quantised unit of length.

    Returns:
        codes uint8[n, oh, ow, t, ceil(k/8)] and norms uint8[n, oh, ow, t].
    """
    top, left, bottom, right = pads
    q = quantise(x, exponent, low, high)
    padded = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right)))
    features = windows(padded - centre.astype(np.int64)[:, None, None], kernel_shape, strides, dilations)
    codes, norms = [], []
    for start in range(0, features.shape[-1], tile_size):
        v = features[..., start : start + tile_size]
        p = projection[:, start : start + tile_size].astype(np.int64)
        codes.append(pack(v @ p.T >= 0))
        norms.append(quantise_norm((v * v).sum(-1), norm_scale))
    return np.stack(codes, axis=3), np.stack(norms, axis=3)


def lsh_conv_integer(
    codes: Codes,
    norms: Codes,
    weight_codes: Codes,
    scale: Floats,
    bias: Floats,
    residual: Floats | None = None,
    *,
    hash_length: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    clip_min: float,
    clip_max: float,
) -> Floats:
    """Estimates a convolution from codes: ``clip(scale sum norm (k - 2 d) + bias + residual)``.

    Args:
        codes: uint8[n, h, w, t, ceil(k/8)].
        norms: uint8[n, h, w, t].
        weight_codes: uint8[b * o, kh, kw, t, ceil(k/8)], b planes of which each counts twice as much as the one
            before it.
        scale: float32[o].
        bias: float32[o].
        residual: float32[n, o, oh, ow], added before the clip, or nothing.
        hash_length: k, in bits.
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.
        clip_min: least value.
        clip_max: greatest value.

    Returns:
        float32[n, o, oh, ow].
    """
    n, h, w = codes.shape[:3]
    o = len(scale)
    _, kh, kw, tiles = weight_codes.shape[:4]
    (sy, sx), (dy, dx) = strides, dilations
    oh, ow = output_extent(h, kh, sy, dy, 0), output_extent(w, kw, sx, dx, 0)
    planes = np.zeros((n, oh, ow, len(weight_codes)), np.int64)
    for ky in range(kh):
        for kx in range(kw):
            rows = slice(ky * dy, ky * dy + (oh - 1) * sy + 1, sy)
            columns = slice(kx * dx, kx * dx + (ow - 1) * sx + 1, sx)
            for i in range(tiles):
                code = codes[:, rows, columns, i, None, :]
                distance = popcount(code ^ weight_codes[:, ky, kx, i])
                planes += norms[:, rows, columns, i, None].astype(np.int64) * (hash_length - 2 * distance)
    total = sum(planes[..., plane * o : (plane + 1) * o] << plane for plane in range(len(weight_codes) // o))
    # Each step rounds to float32, once.
    y = np.asarray(total).astype(np.float32) * scale + bias
    y = np.ascontiguousarray(y.transpose(0, 3, 1, 2))
    if residual is not None:
        y = y + residual
    return np.clip(y, np.float32(clip_min), np.float32(clip_max))
