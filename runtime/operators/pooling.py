"""Native ``MaxPool`` and ``AveragePool`` of channels-last images, one tap after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.builder import PlanBuilder, Work, whole
from runtime.layout import Layout
from runtime.model import Array, Node


@dataclass(frozen=True)
class _Tap:
    """Outputs that a tap reaches inside the image, and the pixels it reads there."""

    target: tuple[slice, slice]
    source: tuple[slice, slice]


def _spans(
    extent: int, positions: int, taps: int, stride: int, dilation: int, pad: int
) -> list[tuple[slice, slice] | None]:
    """For each tap along one axis: the outputs it serves and the inputs it reads, or nothing."""
    spans: list[tuple[slice, slice] | None] = []
    for tap in range(taps):
        shift = tap * dilation - pad
        first = max(0, -(shift // stride))
        last = min(positions - 1, (extent - 1 - shift) // stride)
        if last < first:
            spans.append(None)
            continue
        begin = first * stride + shift
        spans.append((slice(first, last + 1), slice(begin, last * stride + shift + 1, stride)))
    return spans


def _taps(node: Node, builder: PlanBuilder) -> list[_Tap]:
    h, w = builder.spec(node.inputs[0]).shape[2:]
    oh, ow = builder.spec(node.outputs[0]).shape[2:]
    kh, kw = node.attributes["kernel_shape"]
    sy, sx = node.attributes.get("strides", [1, 1])
    dy, dx = node.attributes.get("dilations", [1, 1])
    top, left = node.attributes.get("pads", [0, 0, 0, 0])[:2]
    rows = _spans(h, oh, kh, sy, dy, top)
    columns = _spans(w, ow, kw, sx, dx, left)
    return [
        _Tap((row[0], column[0]), (row[1], column[1]))
        for row in rows
        if row is not None
        for column in columns
        if column is not None
    ]


def _native(node: Node, builder: PlanBuilder) -> bool:
    auto = node.attributes.get("auto_pad", b"NOTSET")
    spec = builder.spec(node.inputs[0])
    plain = len(spec.shape) == 4 and spec.dtype == np.float32 and auto in (b"NOTSET", "NOTSET")
    return plain and len(node.outputs) == 1


def emit_max_pool(node: Node, builder: PlanBuilder) -> bool:
    """``MaxPool`` without indices; pads count as minus infinity."""
    if not _native(node, builder):
        return False
    taps = _taps(node, builder)
    source = builder.read(node.inputs[0], Layout.CHANNELS_LAST)
    out = builder.write(node.outputs[0], Layout.CHANNELS_LAST)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        pairs = [(outputs[0][:, *tap.target], inputs[0][:, *tap.source]) for tap in taps]

        def call() -> None:
            outputs[0].fill(-np.inf)
            for target, pixels in pairs:
                np.maximum(target, pixels, out=target)

        return whole(call)

    builder.add(node, [source], [out], bind)
    return True


def emit_average_pool(node: Node, builder: PlanBuilder) -> bool:
    """``AveragePool``; ``count_include_pad`` counts declared pads, never what ``ceil_mode`` adds."""
    if not _native(node, builder):
        return False
    taps = _taps(node, builder)
    weights = _average_weights(node, builder, taps)
    source = builder.read(node.inputs[0], Layout.CHANNELS_LAST)
    out = builder.write(node.outputs[0], Layout.CHANNELS_LAST)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        pairs = [(outputs[0][:, *tap.target], inputs[0][:, *tap.source]) for tap in taps]

        def call() -> None:
            outputs[0].fill(0)
            for target, pixels in pairs:
                np.add(target, pixels, out=target)
            np.multiply(outputs[0], weights, out=outputs[0])

        return whole(call)

    builder.add(node, [source], [out], bind)
    return True


def _average_weights(node: Node, builder: PlanBuilder, taps: Sequence[_Tap]) -> Array:
    """One over the pixels that each output averages: float32[oh, ow, 1]."""
    h, w = builder.spec(node.inputs[0]).shape[2:]
    oh, ow = builder.spec(node.outputs[0]).shape[2:]
    counts = np.zeros((oh, ow, 1), np.float32)
    if node.attributes.get("count_include_pad", 0):
        top, left, bottom, right = node.attributes.get("pads", [0, 0, 0, 0])
        kh, kw = node.attributes["kernel_shape"]
        sy, sx = node.attributes.get("strides", [1, 1])
        dy, dx = node.attributes.get("dilations", [1, 1])
        rows = _counts(h + top + bottom, oh, kh, sy, dy)
        columns = _counts(w + left + right, ow, kw, sx, dx)
        counts[..., 0] = rows[:, None] * columns[None, :]
    else:
        for tap in taps:
            counts[tap.target] += 1
    return np.float32(1) / np.maximum(counts, np.float32(1))


def _counts(extent: int, positions: int, taps: int, stride: int, dilation: int) -> Array:
    """Taps that fall inside a padded axis, for each output."""
    where = np.arange(positions)[:, None] * stride + np.arange(taps)[None, :] * dilation
    return (where < extent).sum(1).astype(np.float32)
