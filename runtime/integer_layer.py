"""One integer layer outside a plan, weights given at every call: what a training step runs forward."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from runtime.bitpack import code_bytes
from runtime.conversions import SLACK
from runtime.kernels import lsh_conv_integer as conv_kernel
from runtime.kernels.native import NativeCall, native_call
from runtime.kernels.windows import Window
from runtime.model import Array
from runtime.operators.lsh_integer import (
    conv_fields,
    encode_fields,
    encoder_call,
    lengths_row,
    ring_fields,
    scratch_row,
)
from runtime.operators.packing_integer import (
    grouping_of,
    pack_epilogue,
    pack_integer_codes,
    pack_integer_projection,
)

Submit = Callable[..., "Future[Any]"]


@dataclass(frozen=True)
class Geometry:
    """How a layer slides over an image.

    Attributes:
        kernel, stride, dilation: of the windows that are hashed, (y, x).
        pads: left, right, top, bottom.
        taps: extent of the weights' codes, (y, x).
        code_stride, code_dilation: with which these slide over the hashed positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    taps: tuple[int, int]
    code_stride: tuple[int, int]
    code_dilation: tuple[int, int]

    def hashed(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the hashed positions of an image."""
        left, right, top, bottom = self.pads
        return (
            _positions(height + top + bottom, self.kernel[0], self.stride[0], self.dilation[0]),
            _positions(width + left + right, self.kernel[1], self.stride[1], self.dilation[1]),
        )

    def answered(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the answer."""
        rows, columns = self.hashed(height, width)
        return (
            _positions(rows, self.taps[0], self.code_stride[0], self.code_dilation[0]),
            _positions(columns, self.taps[1], self.code_stride[1], self.code_dilation[1]),
        )


def _positions(size: int, kernel: int, stride: int, dilation: int) -> int:
    return (size - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Weights:
    """What a layer is made of.

    Attributes:
        projection: int8[k, f], columns in the order (c, ky, kx), none of them -128.
        tile_size: features in a tile.
        centre: int16[c], in quantised units.
        low: the least quantised value: 0 or -128.
        norm_scale: of the norms of quantised vectors.
        codes: uint8[o, kh, kw, t, B].
        scale, bias: float32[o].
    """

    projection: Array
    tile_size: int
    centre: Array
    low: int
    norm_scale: float
    codes: Array
    scale: Array
    bias: Array


def run_layer(weights: Weights, geometry: Geometry, x: Array, submit: Submit, workers: int) -> tuple[Array, Array]:
    """What ``LshEncodeInteger`` and ``LshConvInteger`` answer.

    Args:
        weights: of the layer.
        geometry: of the layer.
        x: uint8[n, h, w, c], quantised values minus ``low``; with ``SLACK`` bytes behind it.
        submit: hands ``function(*arguments)`` to a thread.
        workers: threads to share the work.

    Returns:
        The answer float32[n, oh, ow, o], and norms uint8[n, h', w', t] of the hashed positions.
    """
    n, h, w, _ = x.shape
    k = weights.projection.shape[0]
    rows, columns = geometry.hashed(h, w)
    oh, ow = geometry.answered(h, w)
    o, _, _, tiles, code = weights.codes.shape
    grouping = grouping_of(code_bytes(k), tiles)
    codes = empty_with_slack((n, rows, columns, tiles * code), np.uint8)
    norms = empty_with_slack((n, rows, columns, tiles * grouping.repeat), np.uint8)
    sums = empty_with_slack((n, rows, columns), np.int32)
    window = _window(geometry, x.shape, (rows, columns))
    packed = pack_integer_projection(weights.projection, weights.centre, -weights.low, weights.tile_size)
    fields = encode_fields(packed, window, -weights.low, (k, weights.projection.shape[1]), weights.tile_size)
    fields |= {"norm_scale": weights.norm_scale, "x": x, "codes": codes, "norms": norms, "sums": sums}
    fields["scratch"] = np.empty((workers, scratch_row(window)), np.uint8)
    fields["lengths"] = np.empty((workers, lengths_row(window, tiles)), np.int32)
    if window.kh * window.kw == 1 and any(geometry.pads):
        fields |= ring_fields(packed, fields, window, tiles)
    _share(encoder_call(packed, fields), n * rows * columns, submit, workers)

    answer = empty_with_slack((n, oh, ow, o), np.float32)
    packed_codes = pack_integer_codes(weights.codes, weights.scale, weights.bias, k, geometry.code_dilation[1])
    fields = conv_fields(
        weights.codes.shape, k, geometry.code_stride, geometry.code_dilation, (rows, columns), (oh, ow)
    )
    fields = fields | pack_epilogue(packed_codes, (-np.inf, np.inf), None, False, False)
    fields |= {"weights": packed_codes.weights, "codes": codes, "norms": norms, "sums": sums}
    fields |= {"residual": 0, "out": answer, "quantised": 0}
    fields["halves"] = empty_with_slack((n * oh * ow,), np.float32)
    call = native_call(conv_kernel.lsh_conv_integer(grouping.group), conv_kernel.ARGUMENTS, fields)
    _share(call, n * oh * ow, submit, workers)
    return answer, norms[..., :: grouping.repeat]


@cache
def _conv_fields(
    shape: tuple[int, ...], hash_length: int, geometry: Geometry, height: int, width: int
) -> dict[str, Any]:
    hashed, answered = geometry.hashed(height, width), geometry.answered(height, width)
    return conv_fields(shape, hash_length, geometry.code_stride, geometry.code_dilation, hashed, answered)


def empty_with_slack(shape: tuple[int, ...], dtype: type) -> Array:
    """An array with the bytes behind it that kernels may touch."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.empty(size + SLACK, np.uint8)[:size].view(dtype).reshape(shape)


def _window(geometry: Geometry, image: tuple[int, ...], hashed: tuple[int, int]) -> Window:
    n, h, w, c = image
    if geometry.kernel == geometry.stride == (1, 1) and not any(geometry.pads):
        return Window(1, n * h * w, c, 1, n * h * w, 1, 1, 1, 1, 1, 1, 0, 0)
    return Window(
        h, w, c, *hashed, *geometry.kernel, *geometry.stride, *geometry.dilation, geometry.pads[2], geometry.pads[0]
    )


def _share(call: NativeCall, positions: int, submit: Submit, workers: int) -> None:
    """Calls a kernel for equal runs of positions, one on each thread."""
    step = -(-positions // workers)
    starts = range(0, positions, step)
    futures = [submit(call, start, min(start + step, positions), slot) for slot, start in enumerate(starts)]
    for future in futures:
        future.result()
