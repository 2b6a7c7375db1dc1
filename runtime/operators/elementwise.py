"""Native operators that work on each element: arithmetic and activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.builder import Operand, PlanBuilder, Work, whole
from runtime.kernels.gelu import gelu
from runtime.layout import Layout
from runtime.model import Array, Node, ValueSpec

Function = Callable[[Sequence[Array], Array], Any]
_FLOAT = np.dtype(np.float32)
_NS_PER_GELU = 10.0  # rough speed on one core, as in ``runtime.operators.lsh``


def add_elementwise(node: Node, builder: PlanBuilder, names: Sequence[str], function: Function) -> None:
    """Adds a step ``function(inputs, out)`` in the layout that needs no conversions.

    Args:
        node: the node.
        builder: the plan.
        names: the inputs that broadcast against each other.
        function: writes ``out``; every input broadcasts to its shape.
    """
    layout = _layout(node, builder, names)
    inputs = [_operand(builder, name, layout) for name in names]
    out = builder.write(node.outputs[0], layout)

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        return whole(lambda: function(arrays, outputs[0]))

    builder.add(node, inputs, [out], bind)


def _layout(node: Node, builder: PlanBuilder, names: Sequence[str]) -> Layout:
    """Channels-last where an input lies so and all the others can."""
    variable = [name for name in names if builder.constant(name) is None]
    images = len(builder.spec(node.outputs[0]).shape) == 4 and all(
        len(builder.spec(name).shape) == 4 for name in variable
    )
    if images and any(builder.holds(name, Layout.CHANNELS_LAST) for name in variable):
        return Layout.CHANNELS_LAST
    return Layout.PLAIN


def _operand(builder: PlanBuilder, name: str, layout: Layout) -> Operand:
    constant = builder.constant(name)
    if layout is Layout.CHANNELS_LAST and constant is not None:
        full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
        array = np.ascontiguousarray(full.transpose(0, 2, 3, 1))
        return Operand(-1, array, ValueSpec(array.shape, array.dtype))
    return builder.read(name, layout)


def _is_float(node: Node, builder: PlanBuilder) -> bool:
    return builder.spec(node.outputs[0]).dtype == _FLOAT


def binary(ufunc: Callable[..., Any]) -> Callable[[Node, PlanBuilder], bool]:
    """Emitter of a float32 operator of two broadcast inputs."""

    def emit(node: Node, builder: PlanBuilder) -> bool:
        if not _is_float(node, builder):
            return False
        add_elementwise(node, builder, node.inputs[:2], lambda inputs, out: ufunc(inputs[0], inputs[1], out=out))
        return True

    return emit


def unary(make: Callable[[Node], Function]) -> Callable[[Node, PlanBuilder], bool]:
    """Emitter of a float32 operator of one input; ``make`` reads the attributes."""

    def emit(node: Node, builder: PlanBuilder) -> bool:
        if not _is_float(node, builder):
            return False
        add_elementwise(node, builder, node.inputs[:1], make(node))
        return True

    return emit


def emit_clip(node: Node, builder: PlanBuilder) -> bool:
    """``Clip`` with constant bounds; ``max`` wins where ``min > max``, as ONNX says."""
    bounds = clip_bounds(node, builder)
    if bounds is None or not _is_float(node, builder):
        return False
    low, high = bounds

    def function(inputs: Sequence[Array], out: Array) -> None:
        np.maximum(inputs[0], low, out=out)
        np.minimum(out, high, out=out)

    add_elementwise(node, builder, node.inputs[:1], function)
    return True


def clip_bounds(node: Node, builder: PlanBuilder) -> tuple[np.float32, np.float32] | None:
    """Bounds of a ``Relu`` or ``Clip`` as float32, or nothing where they are no constants."""
    if node.op_type == "Relu":
        return np.float32(0), np.float32(np.inf)
    bounds = [np.float32(-np.inf), np.float32(np.inf)]
    for index in (1, 2):
        name = node.input(index)
        if name:
            constant = builder.constant(name)
            if constant is None:
                return None
            bounds[index - 1] = np.float32(constant.reshape(-1)[0])
    return bounds[0], bounds[1]


def emit_prelu(node: Node, builder: PlanBuilder) -> bool:
    """``PRelu``: the slope broadcasts to x from the right."""
    if not _is_float(node, builder):
        return False

    def function(inputs: Sequence[Array], out: Array) -> None:
        x, slope = inputs
        np.copyto(out, np.where(x < 0, x * slope, x))

    add_elementwise(node, builder, node.inputs[:2], function)
    return True


def relu(node: Node) -> Function:
    """``max(x, 0)``."""
    return lambda inputs, out: np.maximum(inputs[0], np.float32(0), out=out)


def tanh(node: Node) -> Function:
    """``tanh x``."""
    return lambda inputs, out: np.tanh(inputs[0], out=out)


def sigmoid(node: Node) -> Function:
    """``1 / (1 + exp(-x))``, by way of tanh, which does not overflow."""

    def function(inputs: Sequence[Array], out: Array) -> None:
        np.multiply(inputs[0], np.float32(0.5), out=out)
        np.tanh(out, out=out)
        np.multiply(out, np.float32(0.5), out=out)
        np.add(out, np.float32(0.5), out=out)

    return function


def _hard_sigmoid(x: Array, alpha: np.float32, beta: np.float32, out: Array) -> None:
    np.multiply(x, alpha, out=out)
    np.add(out, beta, out=out)
    np.clip(out, np.float32(0), np.float32(1), out=out)


def hard_sigmoid(node: Node) -> Function:
    """``clip(alpha x + beta, 0, 1)``."""
    alpha = np.float32(node.attributes.get("alpha", 0.2))
    beta = np.float32(node.attributes.get("beta", 0.5))
    return lambda inputs, out: _hard_sigmoid(inputs[0], alpha, beta, out)


def hard_swish(node: Node) -> Function:
    """``x clip(x / 6 + 1 / 2, 0, 1)``."""

    def function(inputs: Sequence[Array], out: Array) -> None:
        _hard_sigmoid(inputs[0], np.float32(1 / 6), np.float32(0.5), out)
        np.multiply(out, inputs[0], out=out)

    return function


def leaky_relu(node: Node) -> Function:
    """``x`` where ``x >= 0``, else ``alpha x``."""
    alpha = np.float32(node.attributes.get("alpha", 0.01))
    return lambda inputs, out: np.copyto(out, np.where(inputs[0] < 0, inputs[0] * alpha, inputs[0]))


def elu(node: Node) -> Function:
    """``x`` where ``x > 0``, else ``alpha (exp(x) - 1)``."""
    alpha = np.float32(node.attributes.get("alpha", 1.0))

    def function(inputs: Sequence[Array], out: Array) -> None:
        np.minimum(inputs[0], np.float32(0), out=out)  # exp of a large positive x would overflow
        np.expm1(out, out=out)
        np.multiply(out, alpha, out=out)
        np.add(out, np.maximum(inputs[0], np.float32(0)), out=out)

    return function


def emit_gelu(node: Node, builder: PlanBuilder) -> bool:
    """``Gelu``: ``x (1 + erf(x / sqrt 2)) / 2``, or its approximation by tanh."""
    if not _is_float(node, builder):
        return False
    if node.attributes.get("approximate", b"none") in (b"tanh", "tanh"):
        add_elementwise(node, builder, node.inputs[:1], _gelu_tanh)
        return True
    layout = _layout(node, builder, node.inputs[:1])
    source = _operand(builder, node.inputs[0], layout)
    out = builder.write(node.outputs[0], layout)

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        x, y = arrays[0].reshape(-1), outputs[0].reshape(-1)
        return Work(lambda begin, end, slot: gelu(x, y, begin, end), y.size, _NS_PER_GELU)

    builder.add(node, [source], [out], bind)
    return True


def _gelu_tanh(inputs: Sequence[Array], out: Array) -> None:
    """``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    x = inputs[0]
    with np.errstate(over="ignore"):  # tanh of an infinity is 1
        np.multiply(x, x, out=out)
        np.multiply(out, np.float32(0.044715), out=out)
        np.add(out, np.float32(1), out=out)
        np.multiply(out, x, out=out)
    np.multiply(out, np.float32(math.sqrt(2 / math.pi)), out=out)
    np.tanh(out, out=out)
    np.add(out, np.float32(1), out=out)
    np.multiply(out, np.float32(0.5), out=out)
    np.multiply(out, x, out=out)
