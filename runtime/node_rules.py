"""What the rules for nodes of the domain share: their attributes, their initializers, their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import AttributeProto

from runtime.bitpack import code_bytes, tail_is_clear
from runtime.errors import ArtifactError
from runtime.model import Array, Node
from runtime.opset import PAD_LIMIT

# every integer attribute fits int32, so index arithmetic in int64 cannot overflow
_LIMIT = 2**31 - 1

INT, INTS, FLOAT = AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT
# Attribute: (ONNX type, length of a list or 0, least value).
AttributeRules = Mapping[str, tuple[int, int, int | None]]
WINDOW_ATTRIBUTES: AttributeRules = {
    "kernel_shape": (INTS, 2, 1),
    "strides": (INTS, 2, 1),
    "dilations": (INTS, 2, 1),
    "pads": (INTS, 4, 0),
    "tile_size": (INT, 0, 1),
}
CONV_ATTRIBUTES: AttributeRules = {
    "hash_length": (INT, 0, 1),
    "strides": (INTS, 2, 1),
    "dilations": (INTS, 2, 1),
    "clip_min": (FLOAT, 0, None),
    "clip_max": (FLOAT, 0, None),
}


def malformed(node: Node, expected: str, got: object) -> ArtifactError:
    """The error for a node that breaks a rule."""
    return ArtifactError(f"node {node.name!r} ({node.op_type}): expected {expected}, got {got}; compile again")


def check_attributes(node: Node, rules: AttributeRules) -> None:
    """Refuses an attribute that is missing, of another type or length, or too small.

    Raises:
        ArtifactError: one is.
    """
    types = {attribute.name: attribute.type for attribute in node.proto.attribute}
    for name, (kind, length, least) in rules.items():
        if types.get(name) != kind:
            expected = f"attribute {name} of type {AttributeProto.AttributeType.Name(kind)}"
            got = AttributeProto.AttributeType.Name(types[name]) if name in types else "none"
            raise malformed(node, expected, got)
        value = node.attributes[name]
        numbers: Sequence[int] = value if kind == INTS else [value]
        if length and len(numbers) != length:
            raise malformed(node, f"{length} numbers in {name}", len(numbers))
        if least is not None and any(number < least or number > _LIMIT for number in numbers):
            raise malformed(node, f"{name} of at least {least} and below 2**31", value)


def check_clip(node: Node) -> None:
    """Refuses bounds in the wrong order, or NaN.

    Raises:
        ArtifactError: they are.
    """
    low, high = node.attributes["clip_min"], node.attributes["clip_max"]
    if not low <= high:
        raise malformed(node, "clip_min <= clip_max", f"{low} and {high}")


def initializer(node: Node, initializers: Mapping[str, Array], index: int, name: str, dtype: type, rank: int) -> Array:
    """An input that must be an initializer of a type and rank, finite, with no empty axis.

    Raises:
        ArtifactError: it is not.
    """
    array = initializers.get(node.inputs[index])
    if array is None:
        raise malformed(node, f"{name} to be an initializer", node.inputs[index])
    if array.dtype != dtype or array.ndim != rank:
        raise malformed(node, f"{name} of {np.dtype(dtype)} and rank {rank}", f"{array.dtype} and {array.ndim}")
    if 0 in array.shape:
        raise malformed(node, f"{name} with no empty axis", array.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise malformed(node, f"{name} finite", "NaN or infinity")
    return array


def check_window(node: Node, projection: Array, centre: Array, channels: Mapping[str, int]) -> None:
    """Refuses a projection that does not fit the window, a centre that does not fit the image, or too wide pads.

    Raises:
        ArtifactError: there is one.
    """
    if max(node.attributes["pads"]) > PAD_LIMIT:
        raise malformed(node, f"pads of at most {PAD_LIMIT}", node.attributes["pads"])
    kh, kw = node.attributes["kernel_shape"]
    features = centre.shape[0] * kh * kw
    if projection.shape[1] != features:
        raise malformed(node, f"projection of {features} columns (channels times taps)", projection.shape[1])
    known = channels.get(node.inputs[0])
    if known is not None and known != centre.shape[0]:
        raise malformed(node, f"centre of {known} channels", centre.shape[0])


def weight_codes(node: Node, initializers: Mapping[str, Array]) -> Array:
    """The third input of a convolution: uint8[o, kh, kw, t, B], tail bits clear.

    Raises:
        ArtifactError: it is something else.
    """
    k = node.attributes["hash_length"]
    codes = initializer(node, initializers, 2, "weight_codes", np.uint8, 5)
    if codes.shape[4] != code_bytes(k):
        raise malformed(node, f"weight_codes of {code_bytes(k)} bytes for hash_length {k}", codes.shape[4])
    if not tail_is_clear(codes, k):
        raise malformed(node, "weight_codes with clear tail bits", "a bit set beyond hash_length")
    return codes


def check_outputs(node: Node, codes: Array, **values: Array) -> None:
    """Refuses values that are not one for each output channel.

    Raises:
        ArtifactError: there are more or fewer.
    """
    for name, array in values.items():
        if array.shape[0] != codes.shape[0]:
            raise malformed(node, f"{name} of {codes.shape[0]} entries", array.shape[0])
