"""Standard operators without a native kernel, run by ONNX's own reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError
from onnx.reference.ops import load_op

from runtime import opset
from runtime.errors import ArtifactError
from runtime.model import Array, Node


@lru_cache(maxsize=512)
def reference_has(op_type: str) -> bool:
    """Whether ONNX's reference implementation can execute a standard operator."""
    try:
        load_op("", op_type, opset.ONNX_OPSET, evaluator_cls=ReferenceEvaluator)
    except (NotImplementedError, RuntimeImplementationError, RuntimeContextError, ValueError):
        return False
    return True


def reference_function(node: Node) -> Callable[[Sequence[Array | None]], list[Array]]:
    """Makes a function that executes one standard node.

    Args:
        node: a node of the default domain.

    Returns:
        A function from the node's inputs (``None`` where omitted) to its outputs.

    Raises:
        ArtifactError: the reference implementation does not know the operator or its attributes.
    """
    names = list(dict.fromkeys(name for name in node.inputs if name))
    outputs = [name for name in node.outputs if name]
    graph = helper.make_graph(
        [node.proto],
        "fallback",
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in names],
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in outputs],
    )
    imports = [helper.make_opsetid("", opset.ONNX_OPSET)]
    try:
        evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports, ir_version=opset.IR_VERSION))
    except Exception as e:  # the reference raises whatever its operator happens to
        raise _cannot(node, e) from e

    def run(inputs: Sequence[Array | None]) -> list[Array]:
        feed = {name: array for name, array in zip(node.inputs, inputs, strict=True) if name}
        try:
            return [np.asarray(array) for array in evaluator.run(outputs, feed)]
        except Exception as e:
            raise _cannot(node, e) from e

    return run


def _cannot(node: Node, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"node {node.name!r}: expected attributes and inputs that ONNX's reference executes, got {node.op_type} "
        f"refused ({type(error).__name__}); replace it before compiling"
    )
