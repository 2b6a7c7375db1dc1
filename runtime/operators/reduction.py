"""Native operators that reduce an axis: means, softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.builder import PlanBuilder, Work, whole
from runtime.kernels.native import native_call
from runtime.kernels.spatial_mean import ARGUMENTS, spatial_mean
from runtime.layout import Layout
from runtime.model import Array, Node

_NS_PER_ELEMENT = 0.1  # rough speed on one core, as in ``runtime.operators.lsh``


def emit_reduce_mean(node: Node, builder: PlanBuilder) -> bool:
    """``ReduceMean`` of float32 over constant axes."""
    axes_name = node.input(1)
    constant = builder.constant(axes_name) if axes_name else None
    spec = builder.spec(node.inputs[0])
    if (axes_name and constant is None) or spec.dtype != np.float32:
        return False
    axes: tuple[int, ...] = tuple(range(len(spec.shape)))
    if constant is not None and constant.size:
        axes = tuple(int(axis) % len(spec.shape) for axis in constant)
    elif node.attributes.get("noop_with_empty_axes", 0):
        axes = ()
    if len(spec.shape) == 4 and axes == (2, 3) and builder.holds(node.inputs[0], Layout.CHANNELS_LAST):
        return _add_spatial_mean(node, builder)
    source = builder.read(node.inputs[0], Layout.PLAIN)
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        def call() -> None:
            if axes:
                np.copyto(outputs[0], inputs[0].mean(axes, dtype=np.float32).reshape(outputs[0].shape))
            else:
                np.copyto(outputs[0], inputs[0])

        return whole(call)

    builder.add(node, [source], [out], bind)
    return True


def _add_spatial_mean(node: Node, builder: PlanBuilder) -> bool:
    """Mean over rows and columns of a channels-last image, in either shape of the result."""
    source = builder.read(node.inputs[0], Layout.CHANNELS_LAST)
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        n, h, w, c = inputs[0].shape
        values = {"x": inputs[0], "out": outputs[0], "area": h * w, "channels": c, "count": h * w}
        return Work(native_call(spatial_mean(), ARGUMENTS, values), n, h * w * c * _NS_PER_ELEMENT)

    builder.add(node, [source], [out], bind)
    return True


def emit_global_average_pool(node: Node, builder: PlanBuilder) -> bool:
    """``GlobalAveragePool`` of float32 images."""
    spec = builder.spec(node.inputs[0])
    if len(spec.shape) != 4 or spec.dtype != np.float32:
        return False
    return _add_spatial_mean(node, builder)


def emit_global_max_pool(node: Node, builder: PlanBuilder) -> bool:
    """``GlobalMaxPool`` of images."""
    if len(builder.spec(node.inputs[0]).shape) != 4:
        return False
    source = builder.read(node.inputs[0], Layout.CHANNELS_LAST)
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        flat = outputs[0].reshape(outputs[0].shape[:2])
        return whole(lambda: np.max(inputs[0], (1, 2), out=flat))

    builder.add(node, [source], [out], bind)
    return True


def emit_softmax(node: Node, builder: PlanBuilder) -> bool:
    """``Softmax`` and ``LogSoftmax`` along one axis, shifted by the maximum."""
    if builder.spec(node.inputs[0]).dtype != np.float32:
        return False
    axis = node.attributes.get("axis", -1)
    logarithm = node.op_type == "LogSoftmax"
    source = builder.read(node.inputs[0], Layout.PLAIN)
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        def call() -> None:
            y = outputs[0]
            np.subtract(inputs[0], inputs[0].max(axis, keepdims=True), out=y)
            exponentials = np.exp(y)
            total = exponentials.sum(axis, keepdims=True)
            if logarithm:
                np.subtract(y, np.log(total), out=y)
            else:
                np.divide(exponentials, total, out=y)

        return whole(call)

    builder.add(node, [source], [out], bind)
    return True
