"""Whether a network treats each image of a batch alone, so that a batch may be cut in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runtime import opset
from runtime.model import Array, Model, Node
from runtime.shapes import Values


def batch_is_separable(model: Model, wanted: Sequence[str], one: Values, two: Values) -> bool:
    """Proves that running images one by one gives the rows of running them together.

    A value is *led* where axis 0 counts images and row i depends on image i alone. Every node must
    keep that; one that is not known to keep it makes the network inseparable.

    Args:
        model: the network.
        wanted: values to compute.
        one: shapes for one image.
        two: shapes for two images.

    Returns:
        Whether every wanted value is led.
    """
    led = {arg.name for arg in model.inputs}
    for node in model.nodes:
        if not any(name in led for name in node.inputs):
            continue
        # the shape that a Reshape takes may differ: what it gives is compared below
        read = node.inputs[:1] if node.op_type == "Reshape" else node.inputs
        if not all(name in led or not name or _is_same(one, two, name) for name in read):
            continue  # reads a value that is neither led nor the same for every batch: its outputs are not led
        doubled = all(_leads(one, two, name) for name in node.outputs if name)
        keeps = True if node.domain == opset.DOMAIN else _keeps(node, led, two)
        if doubled and keeps:
            led.update(name for name in node.outputs if name)
    return all(name in led for name in wanted)


def _is_same(one: Values, two: Values, name: str) -> bool:
    """Whether a value is constant, and the same constant for both batches."""
    small, large = one.constants.get(name), two.constants.get(name)
    return small is not None and large is not None and (small is large or np.array_equal(small, large))


def _leads(one: Values, two: Values, name: str) -> bool:
    small, large = one.specs[name].shape, two.specs[name].shape
    return bool(small) and small[0] == 1 and large[0] == 2 and small[1:] == large[1:]


def _keeps(node: Node, led: set[str], values: Values) -> bool:
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, led, values)


def _always(node: Node, led: set[str], values: Values) -> bool:
    return True


def _elementwise(node: Node, led: set[str], values: Values) -> bool:
    """Constants must not vary along axis 0."""
    rank = len(values.specs[node.outputs[0]].shape)
    for name in node.inputs:
        shape = values.specs[name].shape if name else ()
        if name in led and len(shape) != rank:
            return False
        if name not in led and len(shape) == rank and shape[0] != 1:
            return False
    return True


def _matrix(node: Node, led: set[str], values: Values) -> bool:
    """``A B (+ C)``: A is led and not transposed, B a constant matrix, C a constant row."""
    first, second = node.inputs[:2]
    if first not in led or second in led or node.attributes.get("transA", 0):
        return False
    if len(values.specs[first].shape) < 2 or len(values.specs[second].shape) != 2:
        return False
    addend = node.input(2)
    if not addend:
        return True
    shape = values.specs[addend].shape
    return addend not in led and (len(shape) < 2 or shape[0] == 1)


def _weights(node: Node, led: set[str], values: Values) -> bool:
    return node.inputs[0] in led and not any(name in led for name in node.inputs[1:])


def _other_axis(default: int) -> Callable[[Node, set[str], Values], bool]:
    """The attribute ``axis`` must name another axis than 0, and every input be led."""

    def rule(node: Node, led: set[str], values: Values) -> bool:
        rank = len(values.specs[node.outputs[0]].shape)
        return node.attributes.get("axis", default) % rank != 0 and node.inputs[0] in led

    return rule


def _concat(node: Node, led: set[str], values: Values) -> bool:
    return all(name in led for name in node.inputs) and _other_axis(0)(node, led, values)


def _constant_axes(index: int) -> Callable[[Node, set[str], Values], bool]:
    """The input ``index`` lists constant axes that leave axis 0 alone."""

    def rule(node: Node, led: set[str], values: Values) -> bool:
        axes: Array | None = values.constants.get(node.input(index))
        rank = max(len(values.specs[node.inputs[0]].shape), len(values.specs[node.outputs[0]].shape))
        return axes is not None and axes.size > 0 and all(int(axis) % rank != 0 for axis in axes)

    return rule


def _transpose(node: Node, led: set[str], values: Values) -> bool:
    perm = node.attributes.get("perm", ())
    return len(perm) > 0 and perm[0] == 0


def _pad(node: Node, led: set[str], values: Values) -> bool:
    pads = values.constants.get(node.inputs[1])
    return pads is not None and not node.input(3) and pads[0] == 0 and pads[len(pads) // 2] == 0


_RULES: Mapping[str, Callable[[Node, set[str], Values], bool]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "PRelu"), _elementwise),
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Gelu"), _always),
    **dict.fromkeys(("Identity", "Cast", "Flatten", "Reshape"), _always),  # row-major: equal leading axes, equal rows
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _always),
    **dict.fromkeys(("Conv", "Clip"), _weights),
    **dict.fromkeys(("MatMul", "Gemm"), _matrix),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _other_axis(-1)),
    "Gather": _other_axis(0),
    "Split": _other_axis(0),
    "Concat": _concat,
    "ReduceMean": _constant_axes(1),
    "Squeeze": _constant_axes(1),
    "Unsqueeze": _constant_axes(1),
    "Slice": _constant_axes(3),
    "Transpose": _transpose,
    "Pad": _pad,
}
