"""Compiled loops of the integer layers' training step: one pass where torch's operators take ten.

Activations are channels-last, in float32 or bfloat16, whose bits are taken as ``uint16``.  Quantised values, centred
values and norms are whole numbers below 256, which both hold exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from bitbybit.engine_cpu import as_array, float_bits, from_bits
from bitbybit.layer_geometry import LayerGeometry, output_size
from bitbybit.parallel_cpu import in_parallel, pool
from runtime.bitpack import pack, unpack
from runtime.integer_layer import Answer, SizedGeometry, Weights, empty_with_slack, run_layer

_SIGN = np.uint16(0x8000)
_WRITTEN = {torch.bfloat16: np.uint16, torch.float32: np.float32}  # how centred images are written
_ROUNDING = np.float32(1.5 * 2.0**23)  # added to a number below 2^22, it leaves no place for a fraction


@njit(nogil=True, inline="always")
def _bits(value):
    """float32 as the bits of bfloat16; exact for whole numbers up to 256."""
    return np.uint16(float_bits(value) >> np.uint32(16))


@njit(nogil=True, inline="always")
def _value(bits):
    """float32 of bfloat16's bits."""
    return from_bits(np.uint32(bits) << np.uint32(16))


def _read(value):
    """float32 of a float32, or of bfloat16's bits."""
    raise NotImplementedError("only in compiled code")


@overload(_read, inline="always")
def _read_compiled(value):
    if value == types.uint16:
        return lambda value: _value(value)
    return lambda value: value


def _as_in(array, value):
    """float32 as an array holds it: as it is, or as the bits of bfloat16."""
    raise NotImplementedError("only in compiled code")


@overload(_as_in, inline="always")
def _as_in_compiled(array, value):
    if array.dtype == types.uint16:
        return lambda array, value: _bits(value)
    return lambda array, value: value


@njit(nogil=True, cache=True, inline="always")
def _quantised(value, factor, low, high):
    """The nearest whole number, ties to even, within the limits."""
    return (min(max(value * factor, low), high) + _ROUNDING) - _ROUNDING


@njit(nogil=True, cache=True)
def centre_images(v, q, broken, x, factor, low, high, centre, top, left):
    """Quantises, pads and centres images.

    Args:
        v: float32, or bfloat16 as uint16, [n, H, W * c], written: quantised and centred, with pads.
        q: uint8[n, h, w * c], written: quantised values minus ``low``; anything where x is NaN.
        broken: bool[n], set where an image holds NaN, else left as it is.
        x: float32, or bfloat16 as uint16, [n, h, w * c].
        factor: 2 ** exponent.
        low, high: range of quantised values.
        centre: float32[W * c], whole; the same for every pixel.
        top: pads above, in pixels.
        left: values of the pads before a row.
    """
    height, size = x.shape[1:]
    for n in range(v.shape[0]):
        for i in range(v.shape[1]):
            row, a = v[n, i], i - top
            if 0 <= a < height:
                _fill(row[:left], centre[:left])
                middle = row[left : left + size]
                broken[n] |= _centre_row(middle, q[n, a], x[n, a], factor, low, high, centre[left:])
                _fill(row[left + size :], centre[left + size :])
            else:
                _fill(row, centre)


@njit(nogil=True, cache=True)
def _fill(row, centre):
    for j in range(row.size):
        row[j] = _as_in(row, -centre[j])


@njit(nogil=True, cache=True)
def _centre_row(row, q, x, factor, low, high, centre):
    """Whether the row holds NaN."""
    broken = np.int32(0)
    for j in range(x.size):
        read = _read(x[j])
        broken += np.int32(read != read)
        value = _quantised(read, factor, low, high)
        q[j] = np.uint8(np.int32(value - low))
        row[j] = _as_in(row, value - centre[j])
    return broken > 0


@njit(nogil=True, cache=True)
def uncentre_gradient(grad_x, grad_v, x, factor, low, high, top, left):
    """Backward of ``centre_images``: the gradient passes where nothing was clipped.

    Args:
        grad_x: in the type and shape of x, written.
        grad_v: float32, or bfloat16 as uint16, [n, H, W * c].
        x, low, high, top, left: as for ``centre_images``.
        factor: 2 ** exponent; a product with it is exact.
    """
    for n in range(x.shape[0]):
        for i in range(x.shape[1]):
            _uncentre_row(grad_x[n, i], grad_v[n, i + top, left:], x[n, i], factor, low, high)


@njit(nogil=True, cache=True)
def _uncentre_row(grad_x, grad_v, x, factor, low, high):
    least, most = low - np.float32(0.5), high + np.float32(0.5)
    for j in range(x.size):
        value = _read(x[j]) * factor
        inside = np.float32(value >= least) * np.float32(value <= most)
        grad_x[j] = _as_in(grad_x, _read(grad_v[j]) * (factor * inside))


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


def as_images(x: Tensor) -> np.ndarray:
    """[n, c, h, w] in channels-last memory as an array [n, h, w, c]; bfloat16 as uint16."""
    return as_array(x.detach().permute(0, 2, 3, 1))


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """An array [n, h, w, c] as a channels-last tensor [n, c, h, w]."""
    tensor = torch.from_numpy(array)
    return (tensor.view(dtype) if tensor.dtype != dtype else tensor).permute(0, 3, 1, 2)


class CentreImages(torch.autograd.Function):
    """``(v, q, broken)`` of images, v in the type asked for; see ``centre_images``. Only v carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        exponent: int,
        limits: tuple[int, int],
        centre: Tensor,
        pads: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right, top, bottom = pads
        images = as_images(x)
        n, h, w, c = images.shape
        v = np.empty((n, h + top + bottom, w + left + right, c), _WRITTEN[dtype])
        q, broken = empty_with_slack(images.shape, np.uint8), np.zeros(n, np.bool_)
        middle = np.tile(centre.float().numpy(), v.shape[2])
        factor = np.float32(2.0**exponent)
        low, high = (np.float32(limit) for limit in limits)
        rows = [array.reshape(*array.shape[:2], -1) for array in (v, q, images)]

        def work(start: int, stop: int) -> None:
            centred, quantised, inputs = (array[start:stop] for array in rows)
            centre_images(centred, quantised, broken[start:stop], inputs, factor, low, high, middle, top, left * c)

        in_parallel(work, n, v[0].size)
        ctx.save_for_backward(x)
        ctx.settings = dtype, factor, low, high, top, left * c
        levels, holds_nan = as_tensor(q, torch.uint8), torch.from_numpy(broken)
        ctx.mark_non_differentiable(levels, holds_nan)
        return as_tensor(v, dtype), levels, holds_nan

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor, *_: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        dtype, factor, low, high, top, offset = ctx.settings
        images, gradient = as_images(x), as_images(grad_v.to(dtype))
        out = np.empty(images.shape, images.dtype)
        rows = [array.reshape(*array.shape[:2], -1) for array in (out, gradient, images)]

        def work(start: int, stop: int) -> None:
            outputs, gradients, inputs = (array[start:stop] for array in rows)
            uncentre_gradient(outputs, gradients, inputs, factor, low, high, top, offset)

        in_parallel(work, len(images), images[0].size)
        return as_tensor(out, x.dtype), *(None,) * 5


def apply_signs(z: Tensor, norms: Tensor) -> Tensor:
    """``n sign(z)``, channels-last.

    Args:
        z: bfloat16[n, t * k, h, w]; overwritten if it is channels-last.
        norms: bfloat16[n, t, h, w], channels-last.
    """
    z = z.contiguous(memory_format=torch.channels_last)
    words, lengths = as_images(z), as_images(norms)
    tiles = lengths.shape[3]
    words = words.reshape(-1, tiles, words.shape[3] // tiles)
    lengths = lengths.reshape(-1, tiles)

    def work(start: int, stop: int) -> None:
        sign_norms(words[start:stop], lengths[start:stop])

    in_parallel(work, len(words), words[0].size)
    return z


@njit(nogil=True, cache=True)
def signed_norms(out, codes, norms, places, norm_words, sign_words):
    """Writes ``n sign(z)`` of packed signs, as words of either float type.

    Args:
        out: uint32 or uint16[m, t, k], written.
        codes: uint8[m, t * B].
        norms: uint8[m, t].
        places: intp[t, B], where the bytes of a tile's code lie.
        norm_words: in the type of out[256], what each norm is.
        sign_words: in the type of out[256, 8], the sign bits of each byte's bits: minus where one is 0.
    """
    k = out.shape[2]
    for m in range(out.shape[0]):
        for t in range(out.shape[1]):
            norm = norm_words[norms[m, t]]
            for i in range(k // 8):
                byte = codes[m, places[t, i]]
                for b in range(8):
                    out[m, t, 8 * i + b] = norm ^ sign_words[byte, b]
            for b in range(k % 8):
                out[m, t, k // 8 * 8 + b] = norm ^ sign_words[codes[m, places[t, k // 8]], b]


@cache
def _words(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The last two arguments of ``signed_norms``, for a float type."""
    bits = unpack(np.arange(256, dtype=np.uint8).reshape(-1, 1), 8)
    signs = torch.where(torch.from_numpy(bits), 0.0, -0.0).to(dtype)
    whole = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}[dtype]
    return torch.arange(256).to(dtype).view(whole).numpy(), signs.view(whole).numpy()


class Quantised(NamedTuple):
    """Quantised images.

    Attributes:
        levels: uint8[n, c, h, w], channels-last, above the least quantised value.
        broken: bool[n], whether an image held NaN, which no level stands for.
    """

    levels: Tensor
    broken: Tensor


@dataclass(frozen=True)
class PackedAnswer:
    """What a layer answers by the kernels that artifacts run on.

    Attributes:
        values: float32[n, o, oh, ow], channels-last; NaN for images that held NaN, and outputs whose scale or bias is.
        found: with the codes that were compared.
        hash_length: their bits.
    """

    values: Tensor
    found: Answer
    hash_length: int

    def sign_features(self, count: int, dtype: torch.dtype) -> Tensor:
        """``n sign(P v)`` of the hashed positions of the first images: [count, t * k, h', w'], channels-last.

        Args:
            count: images.
            dtype: float32 or bfloat16; norms are exact in both.
        """
        codes, norms = self.found.codes[:count], self.found.norms[:count]
        (_, h, w, tiles), k = norms.shape, self.hash_length
        norm_words, sign_words = _words(dtype)
        out = np.empty((count * h * w, tiles, k), norm_words.dtype)
        codes, norms = codes.reshape(len(out), -1), norms.reshape(len(out), tiles)

        def work(start: int, stop: int) -> None:
            rows = slice(start, stop)
            signed_norms(out[rows], codes[rows], norms[rows], self.found.places, norm_words, sign_words)

        in_parallel(work, len(out), tiles * k)
        return as_tensor(out.view(_WRITTEN[dtype]).reshape(count, h, w, tiles * k), dtype)


def packed_answer(
    q: Quantised,
    geometry: LayerGeometry,
    *,
    projection: Tensor,
    tile_size: int,
    centre: Tensor,
    low: int,
    norm_scale: float,
    bits: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> PackedAnswer:
    """A layer's answer by the kernels that artifacts run on.

    Args:
        q: the images, as ``CentreImages`` gives them.
        geometry: of the layer.
        projection: int8[k, features].
        tile_size: features in a tile.
        centre: int16[c].
        low: the least quantised value.
        norm_scale: of norms.
        bits: bool[b * o, kh, kw, t, k], the weights' codes in b planes.
        scale, bias: float32[o].
    """
    left, right, top, bottom = geometry.pads
    height, width = q.levels.shape[2:]
    hashed = output_size((height, width), geometry.pads, geometry.kernel, geometry.stride, geometry.dilation)
    taps = (bits.shape[1], bits.shape[2])
    answered = output_size(hashed, (0, 0, 0, 0), taps, geometry.code_stride, geometry.code_dilation)
    sliding = SizedGeometry(
        geometry.kernel, geometry.stride, geometry.dilation, (top, left, bottom, right), hashed,
        geometry.code_stride, geometry.code_dilation, answered,
    )  # fmt: skip
    weights = Weights(
        projection.numpy(), tile_size, centre.numpy(), low, norm_scale, pack(bits.numpy()), scale.numpy(), bias.numpy()
    )
    workers = torch.get_num_threads()
    found = run_layer(weights, sliding, q.levels.permute(0, 2, 3, 1).numpy(), pool(workers).submit, workers)
    values = torch.from_numpy(found.values).permute(0, 3, 1, 2)
    if q.broken.any():  # the kernels know no NaN
        values[q.broken] = math.nan
    if (lost := (scale + bias).isnan()).any():
        values[:, lost] = math.nan
    return PackedAnswer(values, found, len(projection))
