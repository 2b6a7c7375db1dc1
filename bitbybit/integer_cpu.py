"""Compiled loops of the integer layers' training step: one pass where torch's operators take ten.

Activations are bfloat16 and channels-last.  Quantised values, centred values and norms are whole numbers below 256,
which bfloat16 holds exactly; here they are written as its bits, ``uint16``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from bitbybit.engine_cpu import _array, _bitcast, _float_bits, _in_parallel, _store_narrow

_word_float = _bitcast(types.uint32, types.float32)
_SIGN = np.uint16(0x8000)


@njit(nogil=True, inline="always")
def _bits(value):
    """float32 as the bits of bfloat16; exact for whole numbers up to 256."""
    return np.uint16(_float_bits(value) >> np.uint32(16))


@njit(nogil=True, inline="always")
def _value(bits):
    """float32 of bfloat16's bits."""
    return _word_float(np.uint32(bits) << np.uint32(16))


@njit(nogil=True, cache=True, error_model="numpy")
def centre_images(v, norms, x, narrow, factor, low, high, centre, top, left, tile, norm_scale):
    """Quantises, pads and centres images, and takes the norms of pixels.

    Args:
        v: bfloat16 as uint16[n, H, W, c], written.
        norms: bfloat16 as uint16[n, H, W, t], written; no tiles: left alone.
        x: float32, or bfloat16 as uint16, [n, h, w, c].
        narrow: whether x is bfloat16.
        factor: 2 ** exponent.
        low, high: range of quantised values.
        centre: float32[c], whole.
        top, left: pads, in pixels.
        tile: channels in a tile.
        norm_scale: float64.
    """
    n_images, height, width, channels = v.shape
    tiles = norms.shape[3]
    row = np.empty(channels, np.float32)
    for n in range(n_images):
        for i in range(height):
            for j in range(width):
                a, b = i - top, j - left
                if 0 <= a < x.shape[1] and 0 <= b < x.shape[2]:
                    if narrow:
                        for c in range(channels):
                            row[c] = _value(x[n, a, b, c])
                    else:
                        for c in range(channels):
                            row[c] = x[n, a, b, c]
                    for c in range(channels):
                        row[c] = min(max(np.rint(row[c] * factor), low), high) - centre[c]
                else:
                    for c in range(channels):
                        row[c] = -centre[c]
                for c in range(channels):
                    v[n, i, j, c] = _bits(row[c])
                for t in range(tiles):
                    energy = np.float32(0)
                    for c in range(t * tile, min((t + 1) * tile, channels)):
                        energy += row[c] * row[c]
                    norm = np.floor(np.sqrt(np.float64(energy)) * norm_scale + 0.5)
                    norms[n, i, j, t] = _bits(np.float32(min(norm, 255.0)))


@njit(nogil=True, cache=True)
def uncentre_gradient(grad_x, grad_v, x, narrow, factor, low, high, top, left):
    """Backward of ``centre_images``: the gradient passes where nothing was clipped.

    Args:
        grad_x: in the type and shape of x, written.
        grad_v: bfloat16 as uint16[n, H, W, c].
        x, narrow, low, high, top, left: as for ``centre_images``.
        factor: 2 ** exponent.
    """
    least, most = low - np.float32(0.5), high + np.float32(0.5)
    channels = x.shape[3]
    row = np.empty(channels, np.float32)
    for n in range(x.shape[0]):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                if narrow:
                    for c in range(channels):
                        row[c] = _value(x[n, i, j, c])
                else:
                    for c in range(channels):
                        row[c] = x[n, i, j, c]
                for c in range(channels):
                    value = row[c] * factor
                    inside = np.float32(least <= value and value <= most)
                    row[c] = _value(grad_v[n, i + top, j + left, c]) * (factor * inside)
                if narrow:
                    _store_narrow(grad_x[n, i, j], row)
                else:
                    for c in range(channels):
                        grad_x[n, i, j, c] = row[c]


@njit(nogil=True, cache=True)
def sign_norms(z, norms):
    """Overwrites projections by ``n sign(z)``.

    Args:
        z: bfloat16 as uint16[m, t, k], changed.
        norms: bfloat16 as uint16[m, t].
    """
    for m in range(z.shape[0]):
        for t in range(z.shape[1]):
            norm = norms[m, t]
            for b in range(z.shape[2]):
                word = z[m, t, b]
                z[m, t, b] = norm | (word & _SIGN if word != _SIGN else np.uint16(0))


def _images(x: Tensor) -> np.ndarray:
    """[n, c, h, w] in channels-last memory as an array [n, h, w, c]; bfloat16 as uint16."""
    return _array(x.detach().permute(0, 2, 3, 1))


def _like(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """An array [n, h, w, c] as a channels-last tensor [n, c, h, w]."""
    tensor = torch.from_numpy(array)
    return (tensor.view(dtype) if tensor.dtype != dtype else tensor).permute(0, 3, 1, 2)


class CentreImages(torch.autograd.Function):
    """``(v, norms)`` of images; see ``centre_images``. Norms carry no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: int, limits: tuple[int, int], centre: Tensor, pads: tuple[int, ...],
                tiles: int, tile: int, norm_scale: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        left, right, top, bottom = pads
        images = _images(x)
        n, h, w, c = images.shape
        v = np.empty((n, h + top + bottom, w + left + right, c), np.uint16)
        norms = np.empty((*v.shape[:3], tiles), np.uint16)
        factor, middle = np.float32(2.0**exponent), _array(centre.float())
        low, high = (np.float32(limit) for limit in limits)
        narrow = x.dtype == torch.bfloat16

        def work(start: int, stop: int) -> None:
            part = slice(start, stop)
            centre_images(
                v[part], norms[part], images[part], narrow, factor, low, high, middle, top, left, tile, norm_scale
            )

        _in_parallel(work, n, v[0].size)
        ctx.save_for_backward(x)
        ctx.settings = narrow, factor, low, high, top, left
        signs = _like(norms, torch.bfloat16)
        ctx.mark_non_differentiable(signs)
        return _like(v, torch.bfloat16), signs

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor, _: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        images, gradient = _images(x), _images(grad_v.to(torch.bfloat16))
        out = np.empty(images.shape, images.dtype)
        narrow, factor, low, high, top, left = ctx.settings

        def work(start: int, stop: int) -> None:
            part = slice(start, stop)
            uncentre_gradient(out[part], gradient[part], images[part], narrow, factor, low, high, top, left)

        _in_parallel(work, len(images), images[0].size)
        return _like(out, x.dtype), *(None,) * 7


def apply_signs(z: Tensor, norms: Tensor) -> Tensor:
    """``n sign(z)`` in the memory of z.

    Args:
        z: bfloat16[n, t * k, h, w], channels-last; overwritten.
        norms: bfloat16[n, t, h, w], channels-last.
    """
    z = z.contiguous(memory_format=torch.channels_last)
    words, lengths = _images(z), _images(norms)
    tiles = lengths.shape[3]
    words = words.reshape(-1, tiles, words.shape[3] // tiles)
    lengths = lengths.reshape(-1, tiles)

    def work(start: int, stop: int) -> None:
        sign_norms(words[start:stop], lengths[start:stop])

    _in_parallel(work, len(words), words[0].size)
    return z
