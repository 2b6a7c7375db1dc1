"""``Conv``, and ``Gemm`` and ``MatMul`` with constant weights, as steps of a plan.

A following ``Add`` of an image, ``Relu`` or ``Clip`` that nobody else reads is computed in the same
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.builder import Operand, PlanBuilder, Work
from runtime.kernels.conv import conv
from runtime.kernels.depthwise import depthwise
from runtime.kernels.windows import SLACK, Window
from runtime.layout import Layout
from runtime.model import Array, Node
from runtime.operators.elementwise import clip_bounds
from runtime.operators.packing import pack_filters, pad_lanes

_WINDOWS = 4  # windows that share each load of weights
_NO_RESIDUAL = np.empty(0, np.float32)
_NS_PER_POSITION = 15.0  # rough speed on one core, as in ``runtime.operators.lsh``
_NS_PER_PRODUCT = 0.015


@dataclass(frozen=True)
class Epilogue:
    """What a step computes after its sum.

    Attributes:
        output: name of the value that leaves the step.
        residual: name of a value of the same shape to add, or empty.
        low: least value.
        high: greatest value.
    """

    output: str
    residual: str
    low: np.float32
    high: np.float32


def fuse_epilogue(node: Node, builder: PlanBuilder) -> Epilogue:
    """Takes the nodes after ``node`` that its kernel can compute.

    1. An ``Add`` of a value of the same shape that is already made.
    2. Then a ``Relu``, or a ``Clip`` with constant bounds.

    Refuses: a value that is wanted, or that a second node reads.
    """
    value, residual = node.outputs[0], ""
    low, high = np.float32(-np.inf), np.float32(np.inf)
    follower = builder.sole_consumer(value)
    if follower is not None and follower.domain == "" and follower.op_type == "Add":
        other = follower.inputs[1] if follower.inputs[0] == value else follower.inputs[0]
        if other != value and builder.made(other) and builder.spec(other) == builder.spec(value):
            residual, value = other, follower.outputs[0]
            builder.fused.add(id(follower))
            follower = builder.sole_consumer(value)
    if follower is not None and follower.domain == "" and follower.op_type in ("Relu", "Clip"):
        bounds = clip_bounds(follower, builder) if follower.inputs[0] == value else None
        if bounds is not None:
            (low, high), value = bounds, follower.outputs[0]
            builder.fused.add(id(follower))
    return Epilogue(value, residual, low, high)


def emit_conv(node: Node, builder: PlanBuilder) -> bool:
    """``Conv`` of images with constant filters."""
    filters = builder.constant(node.inputs[1])
    bias = builder.constant(node.input(2)) if node.input(2) else None
    padding = node.attributes.get("auto_pad", b"NOTSET")
    if filters is None or filters.ndim != 4 or (node.input(2) and bias is None):
        return False
    if filters.dtype != np.float32 or padding not in (b"NOTSET", "NOTSET"):
        return False
    groups = node.attributes.get("group", 1)
    bias = np.zeros(filters.shape[0], np.float32) if bias is None else bias
    x = builder.read(node.inputs[0], Layout.CHANNELS_LAST)
    _, h, w, c = x.spec.shape
    oh, ow = builder.spec(node.outputs[0]).shape[2:]
    strides = node.attributes.get("strides", [1, 1])
    dilations = node.attributes.get("dilations", [1, 1])
    top, left = node.attributes.get("pads", [0, 0, 0, 0])[:2]
    window = Window(h, w, c, oh, ow, *filters.shape[2:4], *strides, *dilations, top, left)  # type: ignore[call-arg]
    epilogue = fuse_epilogue(node, builder)
    if groups == c and filters.shape[0] == c and groups > 1:
        _add_depthwise(node, builder, epilogue, x, filters, bias, window)
    else:
        _add_conv(node, builder, epilogue, x, filters, bias, window, groups, Layout.CHANNELS_LAST)
    return True


def emit_gemm(node: Node, builder: PlanBuilder) -> bool:
    """``Gemm`` of a matrix by a constant one, or declines."""
    b = builder.constant(node.inputs[1])
    c = builder.constant(node.input(2)) if node.input(2) else np.zeros(1, np.float32)
    if b is None or c is None or b.dtype != np.float32 or node.attributes.get("transA", 0):
        return False
    b = b if node.attributes.get("transB", 0) else b.T
    if (c.ndim == 2 and c.shape[0] != 1) or 0 in b.shape:
        return False
    bias = np.broadcast_to(c.reshape(-1), (b.shape[0],)) * np.float32(node.attributes.get("beta", 1.0))
    return _add_product(node, builder, b * np.float32(node.attributes.get("alpha", 1.0)), bias)


def emit_matmul(node: Node, builder: PlanBuilder) -> bool:
    """``MatMul`` by a constant matrix, or declines."""
    b = builder.constant(node.inputs[1])
    if b is None or b.ndim != 2 or b.dtype != np.float32 or 0 in b.shape:
        return False
    if len(builder.spec(node.inputs[0]).shape) < 2:
        return False
    return _add_product(node, builder, b.T, np.zeros(b.shape[1], np.float32))


def _add_product(node: Node, builder: PlanBuilder, rows: Array, bias: Array) -> bool:
    """``y = x rows' + bias`` as a convolution of 1 x 1 images, one for each row of x."""
    if builder.constant(node.inputs[0]) is not None:
        return False
    epilogue = fuse_epilogue(node, builder)
    x = builder.read(node.inputs[0], Layout.PLAIN)
    window = Window(1, 1, rows.shape[1], 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    _add_conv(node, builder, epilogue, x, rows[:, :, None, None], bias, window, 1, Layout.PLAIN)
    return True


def _add_conv(
    node: Node,
    builder: PlanBuilder,
    epilogue: Epilogue,
    x: Operand,
    filters: Array,
    bias: Array,
    window: Window,
    groups: int,
    layout: Layout,
) -> None:
    constants = [name for name in node.inputs[1:] if name]
    weights, biases = builder.once(node.outputs[0], lambda: pack_filters(filters, bias, groups), constants)
    inputs = [x] + ([builder.read(epilogue.residual, layout)] if epilogue.residual else [])
    out = builder.write(epilogue.output, layout)
    features = filters[0].size
    scratch = builder.scratch((builder.slots, _WINDOWS * features + SLACK), np.float32)
    outputs = filters.shape[0] // groups
    zeros = np.zeros(window.kw * window.c, np.float32)

    def bind(arrays: Sequence[Array], outs: Sequence[Array]) -> Work:
        residual = arrays[1].reshape(-1) if len(arrays) == 2 else _NO_RESIDUAL
        arguments = (
            arrays[0].reshape(-1), zeros, weights, biases, residual, window, groups, outputs,
            epilogue.low, epilogue.high, outs[1], outs[0].reshape(-1),
        )  # fmt: skip

        def call(begin: int, end: int, slot: int) -> None:
            conv(*arguments, begin, end, slot)

        cost = _NS_PER_POSITION + filters.size * _NS_PER_PRODUCT
        return Work(call, outs[0].size // filters.shape[0], cost)

    builder.add(node, inputs, [out, scratch], bind)


def _add_depthwise(
    node: Node, builder: PlanBuilder, epilogue: Epilogue, x: Operand, filters: Array, bias: Array, window: Window
) -> None:
    biases = pad_lanes(bias)
    weights = np.concatenate([pad_lanes(tap) for tap in filters.reshape(window.c, -1).T])
    layout = Layout.CHANNELS_LAST
    inputs = [x] + ([builder.read(epilogue.residual, layout)] if epilogue.residual else [])
    out = builder.write(epilogue.output, layout)

    def bind(arrays: Sequence[Array], outs: Sequence[Array]) -> Work:
        residual = arrays[1].reshape(-1) if len(arrays) == 2 else _NO_RESIDUAL
        arguments = (
            arrays[0].reshape(-1), weights, biases, residual, window, epilogue.low, epilogue.high,
            outs[0].reshape(-1),
        )  # fmt: skip

        def call(begin: int, end: int, slot: int) -> None:
            depthwise(*arguments, begin, end)

        cost = _NS_PER_POSITION + filters.size * _NS_PER_PRODUCT
        return Work(call, outs[0].size // window.c, cost)

    builder.add(node, inputs, [out], bind)
