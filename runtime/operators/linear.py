"""``MatMul`` and ``Gemm``: constant weights by the convolution kernel, others by NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.builder import PlanBuilder, Work, whole
from runtime.layout import Layout
from runtime.model import Array, Node
from runtime.operators import conv


def emit_matmul(node: Node, builder: PlanBuilder) -> bool:
    """``MatMul`` of float32."""
    if builder.spec(node.outputs[0]).dtype != np.float32:
        return False
    if conv.emit_matmul(node, builder):
        return True
    inputs = [builder.read(name, Layout.PLAIN) for name in node.inputs]
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        if outputs[0].ndim == 0:
            return whole(lambda: np.copyto(outputs[0], np.matmul(arrays[0], arrays[1])))
        return whole(lambda: np.matmul(arrays[0], arrays[1], out=outputs[0]))

    builder.add(node, inputs, [out], bind)
    return True


def emit_gemm(node: Node, builder: PlanBuilder) -> bool:
    """``Gemm``: ``alpha A B + beta C``."""
    if builder.spec(node.outputs[0]).dtype != np.float32:
        return False
    if conv.emit_gemm(node, builder):
        return True
    alpha = np.float32(node.attributes.get("alpha", 1.0))
    beta = np.float32(node.attributes.get("beta", 1.0))
    turn_a, turn_b = node.attributes.get("transA", 0), node.attributes.get("transB", 0)
    inputs = [builder.read(name, Layout.PLAIN) for name in node.inputs if name]
    out = builder.write(node.outputs[0], Layout.PLAIN)

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        a = arrays[0].T if turn_a else arrays[0]
        b = arrays[1].T if turn_b else arrays[1]
        y = outputs[0]

        def call() -> None:
            np.matmul(a, b, out=y)
            if alpha != 1:
                np.multiply(y, alpha, out=y)
            if len(arrays) == 3:
                np.add(y, arrays[2] if beta == 1 else beta * arrays[2], out=y)

        return whole(call)

    builder.add(node, inputs, [out], bind)
    return True
