"""What makes an integer node malformed: types, ranges, and sums that might leave the whole numbers of float32."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from runtime.model import Array, Node
from runtime.node_rules import (
    CONV_ATTRIBUTES,
    FLOAT,
    INT,
    WINDOW_ATTRIBUTES,
    AttributeRules,
    check_attributes,
    check_clip,
    check_outputs,
    check_window,
    initializer,
    malformed,
    weight_codes,
)
from runtime.opset import (
    EXACT_LIMIT,
    EXPONENT_LIMIT,
    INTEGER_LEVELS,
    INTEGER_RANGES,
    MOST_PLANES,
    PROJECTION_LEVELS,
    largest_code,
)

_ENCODE_ATTRIBUTES: AttributeRules = {
    **WINDOW_ATTRIBUTES,
    "exponent": (INT, 0, -EXPONENT_LIMIT),
    "low": (INT, 0, -INTEGER_LEVELS),
    "high": (INT, 0, 0),
    "norm_scale": (FLOAT, 0, None),
}
_TILE_LIMIT = (EXACT_LIMIT - 1) // (INTEGER_LEVELS * PROJECTION_LEVELS)  # features whose projection stays exact


def check_encode_integer(node: Node, initializers: Mapping[str, Array], channels: Mapping[str, int]) -> None:
    """Refuses a malformed ``LshEncodeInteger``.

    Args:
        node: the node.
        initializers: the graph's initializers by name.
        channels: extent of axis 1 of the values where the file gives it.

    Raises:
        ArtifactError: the node breaks a rule of docs/operators.md.
    """
    check_attributes(node, _ENCODE_ATTRIBUTES)
    exponent, norm_scale = node.attributes["exponent"], node.attributes["norm_scale"]
    if exponent > EXPONENT_LIMIT:
        raise malformed(node, f"exponent of at most {EXPONENT_LIMIT}", exponent)
    pair = (node.attributes["low"], node.attributes["high"])
    if pair not in INTEGER_RANGES:
        raise malformed(node, f"(low, high) of {' or '.join(str(known) for known in INTEGER_RANGES)}", pair)
    if not (norm_scale > 0 and math.isfinite(norm_scale)):
        raise malformed(node, "norm_scale above 0 and finite", norm_scale)
    projection = initializer(node, initializers, 1, "projection", np.int8, 2)
    centre = initializer(node, initializers, 2, "centre", np.int16, 1)
    check_window(node, projection, centre, channels)
    _check_magnitude(node, "projection", projection, PROJECTION_LEVELS)
    _check_magnitude(node, "centre", centre, INTEGER_LEVELS)
    tile = min(node.attributes["tile_size"], projection.shape[1])
    if tile > _TILE_LIMIT:
        raise malformed(node, f"at most {_TILE_LIMIT} features in a tile, so that projections are exact", tile)


def check_conv_integer(node: Node, initializers: Mapping[str, Array]) -> Array:
    """Refuses a malformed ``LshConvInteger`` or ``LshConvAddInteger``; returns its weights' codes.

    Raises:
        ArtifactError: the node breaks a rule of docs/operators.md.
    """
    check_attributes(node, CONV_ATTRIBUTES)
    check_clip(node)
    codes = weight_codes(node, initializers)
    scale = initializer(node, initializers, 3, "scale", np.float32, 1)
    bias = initializer(node, initializers, 4, "bias", np.float32, 1)
    planes, rest = divmod(len(codes), len(scale))
    if rest or not 1 <= planes <= MOST_PLANES:
        raise malformed(node, f"weight_codes of 1 to {MOST_PLANES} planes of {len(scale)} outputs as scale", len(codes))
    check_outputs(node, codes[: len(scale)], scale=scale, bias=bias)
    _, kh, kw, tiles, _ = codes.shape
    largest = INTEGER_LEVELS * node.attributes["hash_length"] * kh * kw * tiles * largest_code(planes)
    if largest >= EXACT_LIMIT:
        what = "255 * hash_length * taps * tiles * (2**planes - 1)"
        raise malformed(node, f"{what} below {EXACT_LIMIT}, so that sums are exact", largest)
    return codes


def _check_magnitude(node: Node, name: str, array: Array, limit: int) -> None:
    largest = int(np.abs(array.astype(np.int64)).max())
    if largest > limit:
        raise malformed(node, f"{name} within -{limit}..{limit}", largest)
