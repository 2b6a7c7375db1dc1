"""Copies of values between layouts, as steps of a plan and for constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.kernels.native import native_call
from runtime.kernels.quantise import ARGUMENTS, quantise
from runtime.layout import WORD_BYTES, AnyLayout, Interleaved, Layout, Quantised, Repeated, physical
from runtime.model import Array, ValueSpec
from runtime.work import Bind, Work, whole

SLACK = 256  # bytes after an array that kernels may read: they load whole registers, several at a time
_NS_PER_ELEMENT = 0.5  # rough speed on one core, only to judge whether threads should share a step


def conversion(source: AnyLayout, target: AnyLayout) -> Bind:
    """Work that copies a value from one layout to another.

    Args:
        source: ``PLAIN``, unless the target is ``PLAIN``; for ``Quantised`` ``CHANNELS_LAST`` too.
        target: another layout.

    Raises:
        KeyError: there is no such copy.
    """
    if isinstance(target, Quantised):
        return lambda inputs, outputs: quantising(inputs[0], source is Layout.PLAIN, target, outputs[0])
    copy = _copy(source, target)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return whole(lambda: copy(inputs[0], outputs[0]))

    return bind


def from_plain(array: Array, layout: AnyLayout) -> Array:
    """A constant, stored in a layout; C-contiguous, with ``SLACK`` behind it unless it is ``PLAIN`` floats."""
    if layout is Layout.PLAIN and array.dtype != np.uint8:
        return np.ascontiguousarray(array)
    spec = physical(ValueSpec(array.shape, array.dtype), layout)
    size = spec.dtype.itemsize * int(np.prod(spec.shape))
    stored = np.zeros(size + SLACK, np.uint8)[:size].view(spec.dtype).reshape(spec.shape)
    if isinstance(layout, Quantised):
        work = quantising(np.ascontiguousarray(array), True, layout, stored)
        work.call(0, work.positions, 0)
    elif layout is Layout.PLAIN:
        np.copyto(stored, array)
    else:
        _copy(Layout.PLAIN, layout)(array, stored)
    return stored


def quantising(x: Array, plain: bool, layout: Quantised, out: Array) -> Work:
    """Quantises float32[n, c, h, w], or [n, h, w, c] where it is not plain."""
    n, h, w, c = out.shape
    planes = plain and c > 1 and h * w > 1
    values = {"x": x, "out": out, "planes": planes, "area": h * w, "channels": c}
    values |= {"factor": 2.0**layout.exponent, "least": layout.low, "most": layout.high, "zero": -layout.low}
    call = native_call(quantise(), ARGUMENTS, values)
    return Work(call, n, h * w * c * _NS_PER_ELEMENT)


def _copy(source: AnyLayout, target: AnyLayout) -> Callable[[Array, Array], None]:
    if isinstance(target, Repeated):
        count = target.count
        return lambda norms, out: np.copyto(out.reshape(*norms.shape, count), norms[..., None])
    if isinstance(source, Repeated):
        step = source.count
        return lambda norms, out: np.copyto(out, norms[..., ::step])
    if isinstance(target, Interleaved):
        return lambda codes, out: np.copyto(*_pieces(out, codes, target))
    if isinstance(source, Interleaved):
        return lambda codes, out: np.copyto(*_pieces(codes, out, source)[::-1])
    return _COPIES[source, target]


def _pieces(stored: Array, plain: Array, layout: Interleaved) -> tuple[Array, Array]:
    """Views of the same pieces of codes: uint8[..., tiles / together, count, together, size]."""
    together = WORD_BYTES // layout.size
    axes = (*plain.shape[:-2], plain.shape[-2] // together)
    pieces = plain.reshape(*axes, together, layout.count, layout.size)
    return stored.reshape(*axes, layout.count, together, layout.size), pieces.swapaxes(-3, -2)


def _plain_to_channels_last(source: Array, out: Array) -> None:
    np.copyto(out, source.transpose(0, 2, 3, 1))


def _channels_last_to_plain(source: Array, out: Array) -> None:
    np.copyto(out, source.transpose(0, 3, 1, 2))


def _bytes_to_words(source: Array, out: Array) -> None:
    view = out.view(np.uint8)
    view[..., : source.shape[-1]] = source
    view[..., source.shape[-1] :] = 0


def _words_to_bytes(source: Array, out: Array) -> None:
    np.copyto(out, source.view(np.uint8)[..., : out.shape[-1]])


def _norms_to_sums(source: Array, out: Array) -> None:
    np.sum(source, -1, dtype=np.int32, out=out)


_COPIES: dict[tuple[AnyLayout, AnyLayout], Callable[[Array, Array], None]] = {
    (Layout.PLAIN, Layout.CHANNELS_LAST): _plain_to_channels_last,
    (Layout.CHANNELS_LAST, Layout.PLAIN): _channels_last_to_plain,
    (Layout.PLAIN, Layout.WORDS): _bytes_to_words,
    (Layout.WORDS, Layout.PLAIN): _words_to_bytes,
    (Layout.PLAIN, Layout.PIXEL_SUMS): _norms_to_sums,
}
