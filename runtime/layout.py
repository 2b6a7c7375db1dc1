"""Physical layouts of values inside a plan, and the copies between them.

Outside, every value has the shape of the ONNX graph (``PLAIN``). Inside, images lie channels-last
and codes lie in 32-bit words, because that is what the kernels read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum

import numpy as np

from runtime.errors import ArtifactError
from runtime.model import Array, ValueSpec

WORD_BYTES = 4


class Layout(Enum):
    """How a value's elements lie in memory.

    Attributes:
        PLAIN: the order of the ONNX graph, C-contiguous.
        CHANNELS_LAST: [n, c, h, w] stored as [n, h, w, c].
        WORDS: codes uint8[..., B] stored as uint32[..., ceil(B/4)]; bytes beyond B are 0.
    """

    PLAIN = "plain"
    CHANNELS_LAST = "channels_last"
    WORDS = "words"


def physical(spec: ValueSpec, layout: Layout) -> ValueSpec:
    """Shape and dtype of a value as stored in a layout."""
    if layout is Layout.CHANNELS_LAST:
        n, c, h, w = spec.shape
        return ValueSpec((n, h, w, c), spec.dtype)
    if layout is Layout.WORDS:
        words = -(-spec.shape[-1] // WORD_BYTES)
        return ValueSpec((*spec.shape[:-1], words), np.dtype(np.uint32))
    return spec


def from_plain(array: Array, layout: Layout) -> Array:
    """A constant, stored in a layout; C-contiguous."""
    if layout is Layout.PLAIN:
        return np.ascontiguousarray(array)
    spec = physical(ValueSpec(array.shape, array.dtype), layout)
    stored = np.empty(spec.shape, spec.dtype)
    CONVERSIONS[Layout.PLAIN, layout](array, stored)
    return stored


def check_byte_order() -> None:
    """Refuses a machine whose words do not view as the packed bytes.

    Raises:
        ArtifactError: the machine is big-endian.
    """
    if sys.byteorder != "little":
        raise ArtifactError("runtime: expected a little-endian machine, got a big-endian one; use onnxruntime instead")


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


CONVERSIONS: dict[tuple[Layout, Layout], Callable[[Array, Array], None]] = {
    (Layout.PLAIN, Layout.CHANNELS_LAST): _plain_to_channels_last,
    (Layout.CHANNELS_LAST, Layout.PLAIN): _channels_last_to_plain,
    (Layout.PLAIN, Layout.WORDS): _bytes_to_words,
    (Layout.WORDS, Layout.PLAIN): _words_to_bytes,
}
