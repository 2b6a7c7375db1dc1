"""Physical layouts of values inside a plan.

Outside, every value has the shape of the ONNX graph (``PLAIN``). Inside, images lie channels-last,
codes of float layers in 32-bit words, and what integer layers read in bytes, because that is what the
kernels read. The copies between layouts are in ``runtime.conversions``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum

import numpy as np

from runtime.errors import ArtifactError
from runtime.model import ValueSpec

WORD_BYTES = 4


class Layout(Enum):
    """How a value's elements lie in memory.

    Attributes:
        PLAIN: the order of the ONNX graph, C-contiguous.
        CHANNELS_LAST: [n, c, h, w] stored as [n, h, w, c].
        WORDS: codes uint8[..., B] stored as uint32[..., ceil(B/4)]; bytes beyond B are 0.
        PIXEL_SUMS: norms uint8[..., t] stored as int32[...], their sums.
    """

    PLAIN = "plain"
    CHANNELS_LAST = "channels_last"
    WORDS = "words"
    PIXEL_SUMS = "pixel_sums"


@dataclass(frozen=True)
class Repeated:
    """Norms uint8[..., t], each stored ``count`` times: uint8[..., t * count]."""

    count: int


@dataclass(frozen=True)
class Interleaved:
    """Codes uint8[..., t, B] of which ``4 / size`` tiles lie together, in pieces of ``size`` bytes.

    First come the first pieces of these tiles, then their second ones, up to ``count`` pieces of each:
    four bytes of memory are one piece of every tile. The shape is that of the graph.
    """

    count: int
    size: int


@dataclass(frozen=True)
class Quantised:
    """float32[n, c, h, w] stored as uint8[n, h, w, c].

    A byte is ``clamp(round_half_to_even(x * 2**exponent), low, high) - low``.
    """

    exponent: int
    low: int
    high: int


AnyLayout = Layout | Repeated | Interleaved | Quantised


def physical(spec: ValueSpec, layout: AnyLayout) -> ValueSpec:
    """Shape and dtype of a value as stored in a layout."""
    shape = spec.shape
    if isinstance(layout, Quantised):
        return ValueSpec((shape[0], shape[2], shape[3], shape[1]), np.dtype(np.uint8))
    if isinstance(layout, Repeated):
        return ValueSpec((*shape[:-1], shape[-1] * layout.count), spec.dtype)
    if layout is Layout.CHANNELS_LAST:
        return ValueSpec((shape[0], shape[2], shape[3], shape[1]), spec.dtype)
    if layout is Layout.WORDS:
        return ValueSpec((*shape[:-1], -(-shape[-1] // WORD_BYTES)), np.dtype(np.uint32))
    if layout is Layout.PIXEL_SUMS:
        return ValueSpec(shape[:-1], np.dtype(np.int32))
    return spec


def check_byte_order() -> None:
    """Refuses a machine whose words do not view as the packed bytes.

    Raises:
        ArtifactError: the machine is big-endian.
    """
    if sys.byteorder != "little":
        raise ArtifactError("runtime: expected a little-endian machine, got a big-endian one; use onnxruntime instead")
