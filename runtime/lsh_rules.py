"""What makes a node of the domain malformed: the list at the end of docs/operators.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto

from runtime import opset
from runtime.bitpack import code_bytes, tail_is_clear
from runtime.errors import ArtifactError
from runtime.model import Array, Node

_LIMIT = 2**31 - 1  # every integer attribute fits int32, so index arithmetic in int64 cannot overflow

# Attribute: (ONNX type, length of a list or 0, least value).
_INT, _INTS, _FLOAT = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT
_ENCODE_ATTRIBUTES = {
    "kernel_shape": (_INTS, 2, 1),
    "strides": (_INTS, 2, 1),
    "dilations": (_INTS, 2, 1),
    "pads": (_INTS, 4, 0),
    "tile_size": (_INT, 0, 1),
}
_CONV_ATTRIBUTES = {
    "hash_length": (_INT, 0, 1),
    "strides": (_INTS, 2, 1),
    "dilations": (_INTS, 2, 1),
    "clip_min": (_FLOAT, 0, None),
    "clip_max": (_FLOAT, 0, None),
}
_ARITY = {opset.LSH_ENCODE: (3, 2), opset.LSH_CONV: (7, 1), opset.LSH_CONV_ADD: (8, 1)}


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
        raise _malformed(node, f"one of {', '.join(opset.OPERATORS)}", node.op_type)
    inputs, outputs = _ARITY[node.op_type]
    if len(node.inputs) != inputs or len(node.outputs) != outputs or not all(node.inputs):
        raise _malformed(node, f"{inputs} inputs and {outputs} outputs", f"{len(node.inputs)} and {len(node.outputs)}")
    if node.op_type == opset.LSH_ENCODE:
        _check_encode(node, initializers, channels)
    else:
        _check_conv(node, initializers, makers)


def _malformed(node: Node, expected: str, got: object) -> ArtifactError:
    return ArtifactError(f"node {node.name!r} ({node.op_type}): expected {expected}, got {got}; compile again")


def _check_attributes(node: Node, rules: Mapping[str, tuple[int, int, int | None]]) -> None:
    types = {attribute.name: attribute.type for attribute in node.proto.attribute}
    for name, (kind, length, least) in rules.items():
        if types.get(name) != kind:
            expected = f"attribute {name} of type {AttributeProto.AttributeType.Name(kind)}"
            got = AttributeProto.AttributeType.Name(types[name]) if name in types else "none"
            raise _malformed(node, expected, got)
        value = node.attributes[name]
        numbers: Sequence[int] = value if kind == _INTS else [value]
        if length and len(numbers) != length:
            raise _malformed(node, f"{length} numbers in {name}", len(numbers))
        if least is not None and any(number < least or number > _LIMIT for number in numbers):
            raise _malformed(node, f"{name} of at least {least} and below 2**31", value)


def _initializer(node: Node, initializers: Mapping[str, Array], index: int, name: str, dtype: type, rank: int) -> Array:
    array = initializers.get(node.inputs[index])
    if array is None:
        raise _malformed(node, f"{name} to be an initializer", node.inputs[index])
    if array.dtype != dtype or array.ndim != rank:
        raise _malformed(node, f"{name} of {np.dtype(dtype)} and rank {rank}", f"{array.dtype} and {array.ndim}")
    if 0 in array.shape:
        raise _malformed(node, f"{name} with no empty axis", array.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _malformed(node, f"{name} finite", "NaN or infinity")
    return array


def _check_encode(node: Node, initializers: Mapping[str, Array], channels: Mapping[str, int]) -> None:
    _check_attributes(node, _ENCODE_ATTRIBUTES)
    projection = _initializer(node, initializers, 1, "projection", np.float32, 2)
    centre = _initializer(node, initializers, 2, "centre", np.float32, 1)
    kh, kw = node.attributes["kernel_shape"]
    features = centre.shape[0] * kh * kw
    if projection.shape[1] != features:
        raise _malformed(node, f"projection of {features} columns (channels times taps)", projection.shape[1])
    known = channels.get(node.inputs[0])
    if known is not None and known != centre.shape[0]:
        raise _malformed(node, f"centre of {known} channels", centre.shape[0])


def _check_conv(node: Node, initializers: Mapping[str, Array], makers: Mapping[str, Node]) -> None:
    _check_attributes(node, _CONV_ATTRIBUTES)
    k = node.attributes["hash_length"]
    low, high = node.attributes["clip_min"], node.attributes["clip_max"]
    if not low <= high:
        raise _malformed(node, "clip_min <= clip_max", f"{low} and {high}")
    codes = _initializer(node, initializers, 2, "weight_codes", np.uint8, 5)
    norms = _initializer(node, initializers, 3, "weight_norms", np.float32, 4)
    table = _initializer(node, initializers, 4, "table", np.float32, 1)
    scale = _initializer(node, initializers, 5, "scale", np.float64, 1)
    bias = _initializer(node, initializers, 6, "bias", np.float64, 1)
    if codes.shape[4] != code_bytes(k):
        raise _malformed(node, f"weight_codes of {code_bytes(k)} bytes for hash_length {k}", codes.shape[4])
    if norms.shape != codes.shape[:4]:
        raise _malformed(node, f"weight_norms of shape {codes.shape[:4]}", norms.shape)
    if table.shape[0] != k + 1:
        raise _malformed(node, f"table of {k + 1} entries", table.shape[0])
    for name, values in (("scale", scale), ("bias", bias)):
        if values.shape[0] != codes.shape[0]:
            raise _malformed(node, f"{name} of {codes.shape[0]} entries", values.shape[0])
    if not tail_is_clear(codes, k):
        raise _malformed(node, "weight_codes with clear tail bits", "a bit set beyond hash_length")
    _check_pair(node, codes, k, initializers, makers)


def _check_pair(
    node: Node, codes: Array, k: int, initializers: Mapping[str, Array], makers: Mapping[str, Node]
) -> None:
    """Where an ``LshEncode`` feeds the node, its code length and tiles must be the node's."""
    encode = makers.get(node.inputs[0])
    if encode is None or encode.op_type != opset.LSH_ENCODE or encode.domain != opset.DOMAIN:
        return
    projection = initializers[encode.inputs[1]]
    if projection.shape[0] != k:
        raise _malformed(node, f"hash_length {projection.shape[0]} as {encode.name!r} makes", k)
    tiles = -(-projection.shape[1] // encode.attributes["tile_size"])
    if codes.shape[3] != tiles:
        raise _malformed(node, f"weight_codes of {tiles} tiles as {encode.name!r} makes", codes.shape[3])
