"""Dispatch tables: operator name to the function that adds its steps to a plan.

An entry of ``NATIVE_OPERATORS`` returns whether it took the node; where it declines (an attribute or
type it does not handle), ONNX's reference implementation takes it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime import opset
from runtime.builder import PlanBuilder
from runtime.model import Node
from runtime.operators import conv, elementwise, linear, lsh, lsh_integer, movement, pooling, reduction

NATIVE_OPERATORS: dict[str, Callable[[Node, PlanBuilder], bool]] = {
    "Add": elementwise.binary(np.add),
    "AveragePool": pooling.emit_average_pool,
    "Cast": movement.emit_cast,
    "Clip": elementwise.emit_clip,
    "Concat": movement.emit_concat,
    "Conv": conv.emit_conv,
    "Div": elementwise.binary(np.divide),
    "Elu": elementwise.unary(elementwise.elu),
    "Flatten": movement.emit_reshape,
    "Gather": movement.emit_gather,
    "Gelu": elementwise.emit_gelu,
    "Gemm": linear.emit_gemm,
    "GlobalAveragePool": reduction.emit_global_average_pool,
    "GlobalMaxPool": reduction.emit_global_max_pool,
    "HardSigmoid": elementwise.unary(elementwise.hard_sigmoid),
    "HardSwish": elementwise.unary(elementwise.hard_swish),
    "Identity": movement.emit_identity,
    "LeakyRelu": elementwise.unary(elementwise.leaky_relu),
    "LogSoftmax": reduction.emit_softmax,
    "MatMul": linear.emit_matmul,
    "MaxPool": pooling.emit_max_pool,
    "Mul": elementwise.binary(np.multiply),
    "PRelu": elementwise.emit_prelu,
    "Pad": movement.emit_pad,
    "ReduceMean": reduction.emit_reduce_mean,
    "Relu": elementwise.unary(elementwise.relu),
    "Reshape": movement.emit_reshape,
    "Sigmoid": elementwise.unary(elementwise.sigmoid),
    "Slice": movement.emit_slice,
    "Softmax": reduction.emit_softmax,
    "Split": movement.emit_split,
    "Squeeze": movement.emit_reshape,
    "Sub": elementwise.binary(np.subtract),
    "Tanh": elementwise.unary(elementwise.tanh),
    "Transpose": movement.emit_transpose,
    "Unsqueeze": movement.emit_reshape,
}

LSH_OPERATORS: dict[str, Callable[[Node, PlanBuilder], None]] = {
    opset.LSH_ENCODE: lsh.emit_encode,
    opset.LSH_CONV: lsh.emit_conv,
    opset.LSH_CONV_ADD: lsh.emit_conv,
    opset.LSH_ENCODE_INTEGER: lsh_integer.emit_encode,
    opset.LSH_CONV_INTEGER: lsh_integer.emit_conv,
    opset.LSH_CONV_ADD_INTEGER: lsh_integer.emit_conv,
}
