"""Native operators that move elements without computing: reshape, slice, concatenate, pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.builder import PlanBuilder, Work, whole
from runtime.kernels.copying import ARGUMENTS, box_fields, copy_box
from runtime.kernels.native import native_call
from runtime.layout import Layout
from runtime.model import Array, Node

_NS_PER_ELEMENT = 0.1  # rough speed on one core, as in ``runtime.operators.lsh``
# Where ONNX's axis 0..3 of an image lies when it is stored channels-last.
_AXIS = {Layout.PLAIN: (0, 1, 2, 3), Layout.CHANNELS_LAST: (0, 3, 1, 2)}


def _add_plain(node: Node, builder: PlanBuilder, function: Callable[[Sequence[Array], Array], None]) -> bool:
    """Adds a step over the first input in the graph's own order."""
    source = builder.read(node.inputs[0], Layout.PLAIN)
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return whole(lambda: function(inputs, outputs[0]))

    builder.add(node, [source], [out], bind)
    return True


def _image_layout(builder: PlanBuilder, names: Sequence[str]) -> Layout:
    """Channels-last where all the inputs are images and one of them lies so."""
    images = all(len(builder.spec(name).shape) == 4 for name in names)
    if images and any(builder.holds(name, Layout.CHANNELS_LAST) for name in names):
        return Layout.CHANNELS_LAST
    return Layout.PLAIN


def _axis(axis: int, rank: int, layout: Layout) -> int:
    axis = axis % rank
    return _AXIS[layout][axis] if layout is Layout.CHANNELS_LAST else axis


def _copy(source: Array, target: Array, filled: Array | None = None, fill: Any = 0) -> Work:
    """Copies a view to another, after filling a whole array where one is given."""
    fields = box_fields(source, target)
    # The kernel goes along the first axis of both arrays, which the fill must share.
    if fields is None or (filled is not None and (source.ndim < 4 or len(filled) != len(target))):

        def call() -> None:
            if filled is not None:
                filled.fill(fill)
            np.copyto(target, source)

        return whole(call)
    if filled is not None:
        bits = int(np.asarray(fill, filled.dtype).view(np.int32))
        fields |= {"filled": filled, "size": filled[0].size, "fill": bits}
    positions = source.shape[0] if source.ndim == 4 else 1
    return Work(native_call(copy_box(), ARGUMENTS, fields), positions, target.size / positions * _NS_PER_ELEMENT)


def emit_reshape(node: Node, builder: PlanBuilder) -> bool:
    """``Reshape``, ``Flatten``, ``Squeeze``, ``Unsqueeze``: the same elements in the same place."""
    builder.alias(node.outputs[0], Layout.PLAIN, builder.read(node.inputs[0], Layout.PLAIN))
    return True


def emit_identity(node: Node, builder: PlanBuilder) -> bool:
    """``Identity``."""
    builder.alias_all(node.outputs[0], node.inputs[0])
    return True


def emit_transpose(node: Node, builder: PlanBuilder) -> bool:
    """``Transpose``."""
    rank = len(builder.spec(node.inputs[0]).shape)
    axes = tuple(node.attributes.get("perm", range(rank)[::-1]))
    return _add_plain(node, builder, lambda inputs, out: np.copyto(out, inputs[0].transpose(axes)))


def emit_cast(node: Node, builder: PlanBuilder) -> bool:
    """``Cast`` between float32 and integers or booleans; others fall back."""
    source, target = builder.spec(node.inputs[0]).dtype, builder.spec(node.outputs[0]).dtype
    if any(dtype not in (np.float32, np.float64, np.int32, np.int64, np.bool_) for dtype in (source, target)):
        return False
    return _add_plain(node, builder, lambda inputs, out: np.copyto(out, inputs[0].astype(out.dtype)))


def emit_gather(node: Node, builder: PlanBuilder) -> bool:
    """``Gather`` with constant indices."""
    indices = builder.constant(node.inputs[1])
    if indices is None:
        return False
    axis = node.attributes.get("axis", 0)
    return _add_plain(node, builder, lambda inputs, out: np.copyto(out, np.take(inputs[0], indices, axis)))


def emit_concat(node: Node, builder: PlanBuilder) -> bool:
    """``Concat``."""
    layout = _image_layout(builder, node.inputs)
    axis = _axis(node.attributes["axis"], len(builder.spec(node.outputs[0]).shape), layout)
    inputs = [builder.read(name, layout) for name in node.inputs]
    out = builder.write(node.outputs[0], layout)

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return whole(lambda: np.concatenate(arrays, axis, out=outputs[0]))

    builder.add(node, inputs, [out], bind)
    return True


def emit_split(node: Node, builder: PlanBuilder) -> bool:
    """``Split``; the parts' extents are those of the inferred shapes."""
    if not all(node.outputs):
        return False
    layout = _image_layout(builder, node.inputs[:1])
    rank = len(builder.spec(node.inputs[0]).shape)
    graph_axis = node.attributes.get("axis", 0) % rank
    axis = _axis(graph_axis, rank, layout)
    ends = np.cumsum([builder.spec(name).shape[graph_axis] for name in node.outputs])
    source = builder.read(node.inputs[0], layout)
    outs = [builder.write(name, layout) for name in node.outputs]

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        parts = np.split(inputs[0], ends[:-1], axis)

        def call() -> None:
            for part, out in zip(parts, outputs, strict=True):
                np.copyto(out, part)

        return whole(call)

    builder.add(node, [source], outs, bind)
    return True


def emit_slice(node: Node, builder: PlanBuilder) -> bool:
    """``Slice`` with constant bounds."""
    shape = builder.spec(node.inputs[0]).shape
    rank = len(shape)
    names = [node.input(index) for index in range(1, 5)]
    starts, ends, axes, steps = (builder.constant(name) if name else None for name in names)
    if any(name and builder.constant(name) is None for name in names) or starts is None or ends is None:
        return False
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    layout = _image_layout(builder, node.inputs[:1])
    cut = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[_axis(int(axis), rank, layout)] = _slice(int(start), int(end), int(step), shape[axis])
    source = builder.read(node.inputs[0], layout)
    out = builder.write(node.outputs[0], layout)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return _copy(inputs[0][tuple(cut)], outputs[0])

    builder.add(node, [source], [out], bind)
    return True


def _slice(start: int, end: int, step: int, extent: int) -> slice:
    """A Python slice of ONNX's bounds; going backwards, an end before the first element is ``None``."""
    if step > 0:
        return slice(start, end, step)
    begin = start + extent if start < 0 else min(start, extent - 1)
    stop = end + extent if end < 0 else end
    return slice(begin if begin >= 0 else 0, None if stop < 0 else stop, step)


def emit_pad(node: Node, builder: PlanBuilder) -> bool:
    """``Pad`` with a constant value and constant, non-negative pads."""
    mode = node.attributes.get("mode", b"constant")
    pads = builder.constant(node.inputs[1])
    value = builder.constant(node.input(2)) if node.input(2) else np.zeros((), np.float32)
    if mode not in (b"constant", "constant") or pads is None or value is None or node.input(3) or (pads < 0).any():
        return False
    layout = _image_layout(builder, node.inputs[:1])
    shape = builder.spec(node.inputs[0]).shape
    rank = len(shape)
    inner = [slice(None)] * rank
    for axis in range(rank):
        inner[_axis(axis, rank, layout)] = slice(int(pads[axis]), int(pads[axis]) + shape[axis])
    fill = value.reshape(-1)[0]
    source = builder.read(node.inputs[0], layout)
    out = builder.write(node.outputs[0], layout)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return _copy(inputs[0], outputs[0][tuple(inner)], outputs[0], fill)

    builder.add(node, [source], [out], bind)
    return True
