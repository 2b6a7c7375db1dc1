"""Compiled loops of the estimate on a CPU: codes stay packed, values stay in registers.

The estimate of one position is an exclusive-or, a count and a polynomial for every column; here
they run fused, columns in the vector lanes, and nothing of size (positions, columns) is stored but
the slopes that two matrix products of the backward pass read.

Letters as in ``engine``: T tiles, N images, M positions, k bits, J columns, O outputs, and
W = ceil(k / 32) words of a code; bit b of word w is set where component 32 w + b is negative,
bits past k are 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from bitbybit.parallel_cpu import in_parallel
from bitbybit.polynomials import COSINE, SINE

if TYPE_CHECKING:
    from bitbybit.engine import Fold

CHUNK_ELEMENTS = 1 << 20  # slopes at once on a thread: they stay in the last-level cache
WORD_BITS = 32  # as wide as a float, so that counts fill the lanes that the polynomial uses

_A0, _A1, _A2, _A3, _A4 = (np.float32(c) for c in SINE)
_B0, _B1, _B2, _B3, _B4 = (np.float32(c) for c in COSINE)
_TWO = np.float32(2)
_ZERO = np.float32(0)

# Multiply-adds may fuse and sums may be reordered; infinities and NaN keep their meaning.
_FASTMATH = {"contract", "reassoc", "nsz"}


def _count(typingctx, word):  # type: ignore[no-untyped-def]
    return types.uint32(types.uint32), lambda context, builder, signature, args: builder.ctpop(args[0])


def bitcast(source: Any, target: Any) -> Any:
    """A function that reads the bits of one type as another of its width."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], context.get_value_type(target))

    return intrinsic(lambda typingctx, value: (target(source), generate))


_popcount: Any = intrinsic(_count)  # set bits of a uint32
float_bits = bitcast(types.float32, types.uint32)
from_bits = bitcast(types.uint32, types.float32)


@njit(nogil=True, cache=True)
def pack_signs(out, values, sign_bit):
    """Packs the signs of codes.

    Args:
        out: uint32[rows, W], written.
        values: uint16 or uint32 [rows, k], the bits of bfloat16 or float32 codes.
        sign_bit: 15 or 31.
    """
    rows, bits = values.shape
    shift = np.uint32(sign_bit)
    for r in range(rows):
        for w in range(out.shape[1]):
            word = np.uint32(0)
            low = w * WORD_BITS
            for b in range(min(WORD_BITS, bits - low)):
                word |= np.uint32(((np.uint32(values[r, low + b]) >> shift) & np.uint32(1)) << np.uint32(b))
            out[r, w] = word


@njit(nogil=True, cache=True)
def write_signs(out, values, positive, negative):
    """``positive`` where ``values >= 0``, else ``negative``: [n] from float32[n]."""
    for i in range(values.size):
        out[i] = positive if values[i] >= _ZERO else negative


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def quotient_gradient(scaled, grad_norms, grad, values, norms, narrow):
    """Backward of ``u / n``: ``scaled = grad / n`` and ``grad_norms = -sum(scaled * u / n)``.

    Args:
        scaled: float32[rows, k], written.
        grad_norms: float32[rows], written.
        grad: float32, or bfloat16 as uint16, [rows, k].
        values: float32[rows, k], u.
        norms: float32[rows], n; 0 gives gradients of 0.
        narrow: whether ``grad`` is bfloat16.
    """
    for r in range(values.shape[0]):
        inverse = np.float32(1) / norms[r] if norms[r] > _ZERO else _ZERO
        radial = _ZERO
        if narrow:
            for b in range(values.shape[1]):
                scaled[r, b] = from_bits(np.uint32(grad[r, b]) << np.uint32(16)) * inverse
        else:
            for b in range(values.shape[1]):
                scaled[r, b] = grad[r, b] * inverse
        for b in range(values.shape[1]):
            radial += scaled[r, b] * values[r, b]
        grad_norms[r] = -radial * inverse


@njit(nogil=True, cache=True, inline="always")
def _distances(out, code, weights):
    """Hamming distances of one code to every column: float32[J] from uint32[W] and uint32[W, J]."""
    words, columns = weights.shape
    first = code[0]
    if words == 1:
        for j in range(columns):
            out[j] = np.float32(np.int32(_popcount(first ^ weights[0, j])))
        return
    second = code[1]
    for j in range(columns):
        count = np.uint32(_popcount(first ^ weights[0, j]) + _popcount(second ^ weights[1, j]))
        out[j] = np.float32(np.int32(count))
    for w in range(2, words):
        word = code[w]
        for j in range(columns):
            out[j] += np.float32(np.int32(_popcount(word ^ weights[w, j])))


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def correlate_images(y, codes, norms, weights, scales, shifts, size, bits, scratch):
    """Adds the estimates of some images to ``y``; see ``engine.correlate``.

    Args:
        y: float32[N, oh, ow, O], added to.
        codes: uint32[T, N, M, W].
        norms: float32[T, N, M].
        weights: uint32[T, W, J].
        scales: float32[T, J].
        shifts: intp[taps, 2], (dy, dx).
        size: (h, w) of the positions.
        bits: k.
        scratch: float32[2, J].
    """
    height, width = size
    tiles, columns = scales.shape
    images, out_height, out_width, outputs = y.shape
    length = np.float32(bits)
    inverse = np.float32(1.0 / bits)
    distance, total = scratch[0], scratch[1]
    for n in range(images):
        for i in range(height):
            for j in range(width):
                m = i * width + j
                total[:] = _ZERO
                for t in range(tiles):
                    norm = norms[t, n, m]
                    if norm == _ZERO:
                        continue
                    _distances(distance, codes[t, n, m], weights[t])
                    for c in range(columns):
                        s = (length - _TWO * distance[c]) * inverse
                        u = s * s
                        value = s * ((((_A4 * u + _A3) * u + _A2) * u + _A1) * u + _A0)
                        total[c] += value * (norm * scales[t, c])
                for tap in range(shifts.shape[0]):
                    a, b = i + shifts[tap, 0], j + shifts[tap, 1]
                    if 0 <= a < out_height and 0 <= b < out_width:
                        for o in range(outputs):
                            y[n, a, b, o] += total[tap * outputs + o]


@njit(nogil=True, cache=True, inline="always")
def _gather(out, grad_y, n, i, j, shifts):
    """The gradient of every column of a position: float32[J] from float32[N, oh, ow, O]."""
    outputs = grad_y.shape[3]
    for tap in range(shifts.shape[0]):
        a, b = i + shifts[tap, 0], j + shifts[tap, 1]
        base = tap * outputs
        if 0 <= a < grad_y.shape[1] and 0 <= b < grad_y.shape[2]:
            for o in range(outputs):
                out[base + o] = grad_y[n, a, b, o]
        else:
            for o in range(outputs):
                out[base + o] = _ZERO


@njit(nogil=True, cache=True, inline="always")
def _store_narrow(out, values):
    """Rounds float32[J] to nearest, ties to even: the bits of bfloat16, uint16[J]."""
    for c in range(values.shape[0]):
        word = float_bits(values[c])
        out[c] = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def slope_images(
    slope, grad_norms, grad_scales, grad_y, codes, norms, weights, scales, shifts, size, bits, narrow, scratch
):
    """Backward of the estimate, up to the products with the codes.

    Args:
        slope: float32, or bfloat16 as uint16, [T, N, M, J], written: the gradient of the dot
            product of two codes.
        grad_norms: float32[T, N, M], written.
        grad_scales: float32[T, J], added to.
        grad_y: float32[N, oh, ow, O].
        codes, norms, weights, scales, shifts, size, bits: as for ``correlate_images``.
        narrow: whether ``slope`` is bfloat16.
        scratch: float32[3, J].
    """
    height, width = size
    tiles, columns = scales.shape
    length = np.float32(bits)
    inverse = np.float32(1.0 / bits)
    distance, grad, row = scratch[0], scratch[1], scratch[2]
    for n in range(grad_y.shape[0]):
        for i in range(height):
            for j in range(width):
                m = i * width + j
                _gather(grad, grad_y, n, i, j, shifts)
                for t in range(tiles):
                    norm = norms[t, n, m]
                    factor = norm * np.float32(np.pi / 2 / bits)
                    _distances(distance, codes[t, n, m], weights[t])
                    radial = _ZERO
                    for c in range(columns):
                        s = (length - _TWO * distance[c]) * inverse
                        u = s * s
                        value = grad[c] * (s * ((((_A4 * u + _A3) * u + _A2) * u + _A1) * u + _A0))
                        radial += value * scales[t, c]
                        grad_scales[t, c] += value * norm
                        cosine = (((_B4 * u + _B3) * u + _B2) * u + _B1) * u + _B0
                        row[c] = cosine * grad[c] * (factor * scales[t, c])
                    grad_norms[t, n, m] = radial
                    if narrow:
                        _store_narrow(slope[t, n, m], row)
                    else:
                        for c in range(columns):
                            slope[t, n, m, c] = row[c]


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array; bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def pack(codes: Tensor) -> np.ndarray:
    """Packs codes of +-1, float32 or bfloat16 [..., k], not empty, into uint32[..., W]."""
    bits = codes.shape[-1]
    values = as_array(codes.reshape(-1, bits))
    sign_bit, values = (15, values) if codes.dtype == torch.bfloat16 else (31, values.view(np.uint32))
    words = np.empty((len(values), math.ceil(bits / WORD_BITS)), np.uint32)

    def work(start: int, stop: int) -> None:
        pack_signs(words[start:stop], values[start:stop], sign_bit)

    in_parallel(work, len(words), bits)
    return words.reshape(*codes.shape[:-1], -1)


def signs(values: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where ``values >= 0``, else -1: contiguous float32 or bfloat16 [...] from float32[...]."""
    codes = torch.empty(values.shape, dtype=dtype)
    out, flat = as_array(codes).reshape(-1), as_array(values).reshape(-1)
    one, minus_one = as_array(torch.tensor([1, -1], dtype=dtype))

    def work(start: int, stop: int) -> None:
        write_signs(out[start:stop], flat[start:stop], one, minus_one)

    in_parallel(work, len(flat), 1)
    return codes


def quotient_backward(grad: Tensor, values: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``values: float32[N, M, k]`` and ``norms: float32[N, M]`` from that of their quotient."""
    bits = values.shape[-1]
    scaled, grad_norms = torch.empty_like(values), torch.empty_like(norms, memory_format=torch.contiguous_format)
    out, radial = as_array(scaled).reshape(-1, bits), grad_norms.numpy().reshape(-1)
    g, u, n = as_array(grad).reshape(-1, bits), as_array(values).reshape(-1, bits), as_array(norms).reshape(-1)
    narrow = grad.dtype == torch.bfloat16

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        quotient_gradient(out[part], radial[part], g[part], u[part], n[part], narrow)

    in_parallel(work, len(n), bits)
    return scaled, grad_norms


def _layout(fold: Fold, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifts intp[taps, 2], and weight codes uint32[T, J, W] as uint32[T, W, J]: columns side by side."""
    shifts = np.array(fold.shifts, dtype=np.intp).reshape(-1, 2)
    return shifts, np.ascontiguousarray(weights.transpose(0, 2, 1))


def correlate_forward(
    codes: np.ndarray, norms: Tensor, weights: np.ndarray, scales: Tensor, fold: Fold, bits: int
) -> Tensor:
    """``engine.correlate`` from packed codes uint32[T, N, M, W] and weights uint32[T, J, W]; k bits."""
    tiles, images, positions = norms.shape
    columns = scales.shape[1]
    shifts, by_word = _layout(fold, weights)
    y = torch.zeros(images, *fold.out_size, columns // len(shifts), dtype=torch.float32)
    out, lengths, widths = y.numpy(), as_array(norms), as_array(scales)

    def work(n0: int, n1: int) -> None:
        scratch = np.empty((2, columns), np.float32)
        correlate_images(
            out[n0:n1], codes[:, n0:n1], lengths[:, n0:n1], by_word, widths, shifts, fold.size, bits, scratch
        )

    in_parallel(work, images, tiles * positions * columns)
    return y


def correlate_backward(
    grad_y: Tensor,
    codes: Tensor,
    packed: np.ndarray,
    norms: Tensor,
    weight_codes: Tensor,
    weights: np.ndarray,
    scales: Tensor,
    fold: Fold,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``codes``, ``norms``, ``weight_codes`` and ``scales``; see ``engine.correlate``.

    ``codes`` may be bfloat16: then so are the slopes and the products with them.  ``packed`` and
    ``weights`` are both codes packed, uint32[T, N, M, W] and uint32[T, J, W].
    """
    tiles, images, positions, bits = codes.shape
    columns = scales.shape[1]
    shifts, by_word = _layout(fold, weights)
    grad, lengths, widths = as_array(grad_y), as_array(norms), as_array(scales)
    grad_codes, grad_norms = torch.empty_like(codes), torch.empty_like(norms, memory_format=torch.contiguous_format)
    radial = grad_norms.numpy()
    narrow = weight_codes.to(codes.dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, tiles * positions * columns))

    def work(start: int, stop: int) -> tuple[Tensor, Tensor]:
        grad_weight_codes, grad_scales = torch.zeros_like(weight_codes), torch.zeros_like(scales)
        scratch = np.empty((3, columns), np.float32)
        buffer = torch.empty(tiles, min(step, stop - start), positions, columns, dtype=codes.dtype)
        for n0 in range(start, stop, step):
            n1 = min(n0 + step, stop)
            slope = buffer[:, : n1 - n0]
            view = (buffer.view(torch.uint16) if codes.dtype == torch.bfloat16 else buffer).numpy()[:, : n1 - n0]
            slope_images(
                view, radial[:, n0:n1], grad_scales.numpy(), grad[n0:n1], packed[:, n0:n1], lengths[:, n0:n1],
                by_word, widths, shifts, fold.size, bits, codes.dtype == torch.bfloat16, scratch,
            )  # fmt: skip
            for t in range(tiles):
                rows = slope[t].reshape(-1, columns)
                torch.mm(rows, narrow[t], out=grad_codes[t, n0:n1].view(-1, bits))
                grad_weight_codes[t] += torch.mm(rows.t(), codes[t, n0:n1].reshape(-1, bits))
        return grad_weight_codes, grad_scales

    shares = in_parallel(work, images, tiles * positions * columns)
    grad_weight_codes, grad_scales = (torch.stack(part).sum(0) for part in zip(*shares, strict=True))
    return grad_codes, grad_norms, grad_weight_codes, grad_scales
