"""What makes a node of the domain malformed: the list at the end of docs/operators.md.

The rules for the integer operators are in ``runtime.integer_rules``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime import opset
from runtime.integer_rules import check_conv_integer, check_encode_integer
from runtime.model import Array, Node
from runtime.node_rules import (
    CONV_ATTRIBUTES,
    WINDOW_ATTRIBUTES,
    check_attributes,
    check_clip,
    check_outputs,
    check_window,
    initializer,
    malformed,
    weight_codes,
)

# Operator: numbers of inputs and outputs.
_ARITY = {
    opset.LSH_ENCODE: (3, 2),
    opset.LSH_CONV: (7, 1),
    opset.LSH_CONV_ADD: (8, 1),
    opset.LSH_ENCODE_INTEGER: (3, 2),
    opset.LSH_CONV_INTEGER: (5, 1),
    opset.LSH_CONV_ADD_INTEGER: (6, 1),
}


def check_lsh_node(
    node: Node, initializers: Mapping[str, Array], makers: Mapping[str, Node], channels: Mapping[str, int]
) -> None:
    """Refuses a malformed node of the domain.

    Args:
        node: the node.
        initializers: the graph's initializers by name.
        makers: the node that makes each value.
        channels: extent of axis 1 of the values where the file gives it.

    Raises:
        ArtifactError: the node breaks a rule of docs/operators.md.
    """
    if node.op_type not in _ARITY:
        raise malformed(node, f"one of {', '.join(opset.OPERATORS)}", node.op_type)
    inputs, outputs = _ARITY[node.op_type]
    if len(node.inputs) != inputs or len(node.outputs) != outputs or not all(node.inputs):
        raise malformed(node, f"{inputs} inputs and {outputs} outputs", f"{len(node.inputs)} and {len(node.outputs)}")
    if node.op_type == opset.LSH_ENCODE:
        _check_encode(node, initializers, channels)
    elif node.op_type == opset.LSH_ENCODE_INTEGER:
        check_encode_integer(node, initializers, channels)
    elif node.op_type in opset.INTEGER_OPERATORS:
        codes = check_conv_integer(node, initializers)
        _check_pair(node, codes, opset.LSH_ENCODE_INTEGER, initializers, makers)
    else:
        codes = _check_conv(node, initializers)
        _check_pair(node, codes, opset.LSH_ENCODE, initializers, makers)


def _check_encode(node: Node, initializers: Mapping[str, Array], channels: Mapping[str, int]) -> None:
    check_attributes(node, WINDOW_ATTRIBUTES)
    projection = initializer(node, initializers, 1, "projection", np.float32, 2)
    centre = initializer(node, initializers, 2, "centre", np.float32, 1)
    check_window(node, projection, centre, channels)


def _check_conv(node: Node, initializers: Mapping[str, Array]) -> Array:
    check_attributes(node, CONV_ATTRIBUTES)
    check_clip(node)
    k = node.attributes["hash_length"]
    codes = weight_codes(node, initializers)
    norms = initializer(node, initializers, 3, "weight_norms", np.float32, 4)
    table = initializer(node, initializers, 4, "table", np.float32, 1)
    scale = initializer(node, initializers, 5, "scale", np.float64, 1)
    bias = initializer(node, initializers, 6, "bias", np.float64, 1)
    if norms.shape != codes.shape[:4]:
        raise malformed(node, f"weight_norms of shape {codes.shape[:4]}", norms.shape)
    if table.shape[0] != k + 1:
        raise malformed(node, f"table of {k + 1} entries", table.shape[0])
    check_outputs(node, codes, scale=scale, bias=bias)
    return codes


def _check_pair(
    node: Node, codes: Array, operator: str, initializers: Mapping[str, Array], makers: Mapping[str, Node]
) -> None:
    """Where an encode node feeds the node, its arithmetic, code length and tiles must be the node's."""
    encode = makers.get(node.inputs[0])
    while encode is not None and encode.op_type == "Identity" and encode.domain == "" and encode.inputs:
        encode = makers.get(encode.inputs[0])
    if encode is None or encode.op_type not in opset.ENCODE_OPERATORS or encode.domain != opset.DOMAIN:
        return
    if encode.op_type != operator:
        raise malformed(node, f"codes of an {operator} node", f"those of {encode.name!r} ({encode.op_type})")
    projection, k = initializers[encode.inputs[1]], node.attributes["hash_length"]
    if projection.shape[0] != k:
        raise malformed(node, f"hash_length {projection.shape[0]} as {encode.name!r} makes", k)
    tiles = -(-projection.shape[1] // encode.attributes["tile_size"])
    if codes.shape[3] != tiles:
        raise malformed(node, f"weight_codes of {tiles} tiles as {encode.name!r} makes", codes.shape[3])
