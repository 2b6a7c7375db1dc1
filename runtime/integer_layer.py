"""One integer layer outside a plan, weights given at every call: what a training step runs forward."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from runtime.bitpack import code_bytes
from runtime.conversions import SLACK, from_plain
from runtime.kernels import lsh_conv_integer as conv_kernel
from runtime.kernels.native import NativeCall, native_call
from runtime.model import Array
from runtime.operators.lsh import make_window
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
class SizedGeometry:
    """How a layer slides over an image of a given size; pairs are (y, x).

    Attributes:
        kernel, stride, dilation: of the windows that are hashed.
        pads: top, left, bottom, right.
        hashed: positions of these windows.
        code_stride, code_dilation: with which the weights' codes slide over the hashed positions.
        answered: positions of the answer.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    hashed: tuple[int, int]
    code_stride: tuple[int, int]
    code_dilation: tuple[int, int]
    answered: tuple[int, int]


@dataclass(frozen=True)
class Weights:
    """What a layer is made of.

    Attributes:
        projection: int8[k, f], columns in the order (c, ky, kx), none of them -128.
        tile_size: features in a tile.
        centre: int16[c], in quantised units.
        low: the least quantised value: 0 or -128.
        norm_scale: of the norms of quantised vectors.
        codes: uint8[b * o, kh, kw, t, B], b planes, the least first.
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


@dataclass(frozen=True)
class Answer:
    """What a layer answers, and the codes that it has compared.

    Attributes:
        values: float32[n, oh, ow, o].
        codes: uint8[n, h', w', t * B], of the hashed positions, bytes in the order of ``places``.
        norms: uint8[n, h', w', t].
        places: intp[t, B], where byte B of a tile's code lies.
    """

    values: Array
    codes: Array
    norms: Array
    places: Array


def run_layer(weights: Weights, geometry: SizedGeometry, x: Array, submit: Submit, workers: int) -> Answer:
    """What ``LshEncodeInteger`` and ``LshConvInteger`` answer.

    Args:
        weights: of the layer.
        geometry: of the layer.
        x: uint8[n, h, w, c], quantised values minus ``low``; with ``SLACK`` bytes behind it.
        submit: hands ``function(*arguments)`` to a thread.
        workers: threads to share the work.

    Returns:
        The answer, and what it was found from.
    """
    n, k = len(x), weights.projection.shape[0]
    o = len(weights.scale)
    rows, _, _, tiles, code = weights.codes.shape
    grouping = grouping_of(code_bytes(k), tiles)
    codes = empty_with_slack((n, *geometry.hashed, tiles * code), np.uint8)
    norms = empty_with_slack((n, *geometry.hashed, tiles * grouping.repeat), np.uint8)
    sums = empty_with_slack((n, *geometry.hashed), np.int32)
    window = make_window(x.shape, geometry.hashed, geometry.kernel, geometry.stride, geometry.dilation, geometry.pads)
    packed = pack_integer_projection(weights.projection, weights.centre, -weights.low, weights.tile_size)
    fields = encode_fields(packed, window, -weights.low, weights.projection.shape, weights.tile_size)
    fields |= {"norm_scale": weights.norm_scale, "x": x, "codes": codes, "norms": norms, "sums": sums}
    fields["scratch"] = np.empty((workers, scratch_row(window)), np.uint8)
    fields["lengths"] = np.empty((workers, lengths_row(window, tiles)), np.int32)
    if window.kh * window.kw == 1 and any(geometry.pads):
        fields |= ring_fields(packed, fields, window, tiles)
    _share(encoder_call(packed, fields), sums.size, submit, workers)

    answer = empty_with_slack((n, *geometry.answered, o), np.float32)
    halves = empty_with_slack(answer.shape[:3], np.float32)
    packed_codes = pack_integer_codes(weights.codes, weights.scale, weights.bias, k, geometry.code_dilation[1])
    shape = (o, *weights.codes.shape[1:])
    fields = _conv_fields(shape, rows // o, k, geometry) | {"weights": packed_codes.weights}
    fields |= pack_epilogue(packed_codes, (-np.inf, np.inf), None, False, False)
    fields |= {"codes": codes, "norms": norms, "sums": sums, "halves": halves}
    fields |= {"residual": 0, "out": answer, "quantised": 0}
    call = native_call(conv_kernel.lsh_conv_integer(grouping.group, rows // o), conv_kernel.ARGUMENTS, fields)
    _share(call, halves.size, submit, workers)
    order = from_plain(np.arange(tiles * code).reshape(tiles, code), grouping.codes).reshape(-1)
    return Answer(answer, codes, norms[..., :: grouping.repeat], np.argsort(order).reshape(tiles, code))


@cache
def _conv_fields(shape: tuple[int, ...], planes: int, hash_length: int, geometry: SizedGeometry) -> dict[str, Any]:
    """What depends on shapes alone, found once."""
    return conv_fields(
        shape, planes, hash_length, geometry.code_stride, geometry.code_dilation, geometry.hashed, geometry.answered
    )


def empty_with_slack(shape: tuple[int, ...], dtype: type) -> Array:
    """An array with the bytes behind it that kernels may touch."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.empty(size + SLACK, np.uint8)[:size].view(dtype).reshape(shape)


def _share(call: NativeCall, positions: int, submit: Submit, workers: int) -> None:
    """Calls a kernel for equal runs of positions, one on each thread."""
    step = -(-positions // workers)
    starts = range(0, positions, step)
    futures = [submit(call, start, min(start + step, positions), slot) for slot, start in enumerate(starts)]
    for future in futures:
        future.result()
